// A PNG that is written row by row, so that a large result is never in memory unpacked.

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function chunk(type, content) {
  const out = new Uint8Array(content.length + 12);
  const view = new DataView(out.buffer);
  view.setUint32(0, content.length);
  out.set(new TextEncoder().encode(type), 4);
  out.set(content, 8);
  let crc = 0xffffffff;
  for (let i = 4; i < content.length + 8; i++) crc = CRC[(crc ^ out[i]) & 0xff] ^ (crc >>> 8);
  view.setUint32(content.length + 8, ~crc >>> 0);
  return out;
}

export class PngWriter {
  /** 8-bit RGB in sRGB, of `width` x `height` pixels. */
  constructor(width, height) {
    const header = new Uint8Array(13);
    const view = new DataView(header.buffer);
    view.setUint32(0, width);
    view.setUint32(4, height);
    header.set([8, 2, 0, 0, 0], 8);
    const signature = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);
    this.parts = [signature, chunk('IHDR', header), chunk('sRGB', Uint8Array.of(0))];
    this.stride = width * 3;
    this.above = new Uint8Array(this.stride);
    const packer = new CompressionStream('deflate');
    this.input = packer.writable.getWriter();
    this.packed = this.#collect(packer.readable);
  }

  async #collect(stream) {
    const reader = stream.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      this.parts.push(new Blob([chunk('IDAT', value)])); // the browser may keep a Blob on the disk
    }
  }

  /** Append rows: packed RGB. Each is filtered by Paeth's predictor. */
  async write(rgb) {
    const { stride } = this;
    const rows = rgb.length / stride;
    const out = new Uint8Array(rgb.length + rows);
    for (let y = 0; y < rows; y++) {
      const row = rgb.subarray(y * stride, (y + 1) * stride);
      const to = y * (stride + 1);
      out[to] = 4;
      for (let x = 0; x < stride; x++) {
        const left = x < 3 ? 0 : row[x - 3];
        const corner = x < 3 ? 0 : this.above[x - 3];
        out[to + 1 + x] = row[x] - paeth(left, this.above[x], corner);
      }
      this.above = row;
    }
    await this.input.write(out);
  }

  /** @returns {Promise<Blob>} the file. */
  async finish() {
    await this.input.close();
    await this.packed;
    return new Blob([...this.parts, chunk('IEND', new Uint8Array(0))], { type: 'image/png' });
  }
}

function paeth(left, above, corner) {
  const toLeft = Math.abs(above - corner);
  const toAbove = Math.abs(left - corner);
  const toCorner = Math.abs(left + above - 2 * corner);
  if (toLeft <= toAbove && toLeft <= toCorner) return left;
  return toAbove <= toCorner ? above : corner;
}
