// A picture's way through the model: engine/runtime/restore.py and align.py in JavaScript. It runs in a browser and in
// Node.
import { alignRows, FULL, HALO, isNeutral, keepFlat, makeNeutral } from './color.js';
import { noiseField } from './noise.js';
import { Resampler } from './resample.js';
import { blend, cover } from './tiles.js';

const { fround } = Math;
const ROWS = 128; // worked on at a time

/**
 * Upscale a picture.
 *
 * @param {{data: Uint8ClampedArray, width: number, height: number}} picture RGBA, 8 bit; alpha is ignored.
 * @param {object} model
 * @param {object} model.manifest of the engine folder.
 * @param {Float32Array} model.table the normal quantiles.
 * @param {(image: Float32Array, noise: Float32Array, height: number, width: number) => Promise<Float32Array>} model.run
 *     the graph `generator`: image [3,h,w] in [-1,1] and noise -> output like image.
 * @param {bigint} seed of the noise.
 * @param {(done: number, total: number) => void} progress called after each tile.
 * @yields {{first: number, rgb: Uint8Array}} rows of the result, packed, from the top to the bottom.
 */
export async function* upscale(picture, model, seed, progress = () => {}) {
  const { scale } = model.manifest.geometry;
  const upsampled = new Resampler(picture, scale);
  const neutral = isNeutral(picture.data);
  for await (const { first, planes } of aligned(restored(upsampled, model, seed, progress), upsampled)) {
    const rgb = new Uint8Array(planes[0].length * 3);
    planes.forEach((plane, c) => {
      for (let i = 0; i < plane.length; i++) rgb[i * 3 + c] = Math.floor((plane[i] * 255 + 32767) / FULL);
    });
    if (neutral) makeNeutral(rgb);
    yield { first, rgb };
  }
}

/** Rows behind the model, 16 bit, colours not aligned yet: yields {first, planes}. */
async function* restored(upsampled, { manifest, table, run }, seed, progress) {
  const { factor, channels } = manifest.geometry;
  const multiple = manifest.geometry.multiple / factor;
  const [least, longest] = manifest.profile.tile.map((side) => side / factor);
  // A short overlap for short tiles: at most a quarter.
  const quarter = Math.floor(Math.floor(longest / 4) / multiple) * multiple;
  const overlap = Math.min(manifest.geometry.overlap / factor, quarter);
  const axis = (side) => cover(Math.max(Math.ceil(side / factor), least), longest, overlap, multiple);
  const rows = axis(upsampled.height);
  const columns = axis(upsampled.width);
  const height = rows.tile * factor;
  const width = columns.tile * factor;
  const total = rows.starts.length * columns.starts.length;
  let done = 0;

  async function tile(top, left) {
    const image = upsampled.window(top * factor, height, left * factor, width);
    const unit = fround(2 / 255);
    for (let i = 0; i < image.length; i++) {
      image[i] = Math.min(Math.max(fround(image[i] * unit) - 1, -1), 1);
    }
    const result = await run(image, noiseField(table, seed, channels, top, rows.tile, left, columns.tile), height, width);
    // A sum is finite only if every value is; overflow cannot reach it.
    if (!Number.isFinite(result.reduce((sum, value) => sum + value, 0))) {
      throw new Error(
        `The model gave a value that is not finite in the tile at row ${top * factor}, column ${left * factor}.`,
      );
    }
    progress(++done, total);
    return result;
  }

  for await (const band of blend(rows, columns, factor, tile)) {
    const count = Math.min(band.count, upsampled.height - band.first);
    const planes = band.planes.map((plane) => {
      const out = new Uint16Array(count * upsampled.width);
      for (let y = 0; y < count; y++) {
        for (let x = 0; x < upsampled.width; x++) {
          const value = Math.min(Math.max(plane[y * band.width + x], -1), 1);
          out[y * upsampled.width + x] = fround(fround(fround(value + 1) * (FULL / 2)) + 0.5);
        }
      }
      return out;
    });
    if (count > 0) yield { first: band.first, planes };
  }
}

/** Give rows the low frequencies of the enlarged input; a row leaves as soon as all that it depends on is there. */
async function* aligned(bands, upsampled) {
  const { height, width } = upsampled;
  let kept = [0, 1, 2].map(() => new Uint16Array(0)); // rows from `top`
  let top = 0;
  let done = 0;
  for await (const band of bands) {
    kept = kept.map((rows, c) => joined(rows, band.planes[c]));
    const there = top + kept[0].length / width;
    const ready = there === height ? there : there - HALO;
    while (done < ready) {
      const last = Math.min(done + ROWS, ready);
      const from = Math.max(done - HALO, 0);
      const to = Math.min(last + HALO, height);
      const target = upsampled.window(from, to - from, 0, width);
      const area = (to - from) * width;
      const planes = kept.map((rows, c) =>
        alignRows(
          rows.subarray((from - top) * width, (to - top) * width),
          target.subarray(c * area, (c + 1) * area),
          width,
          done - from,
          last - from,
        ),
      );
      const { picture } = upsampled;
      planes.forEach((rows, c) => keepFlat(rows, done, picture, c, width / picture.width));
      yield { first: done, planes };
      done = last;
    }
    const first = Math.max(done - HALO, 0);
    kept = kept.map((rows) => rows.slice((first - top) * width));
    top = first;
  }
}

function joined(a, b) {
  const out = new Uint16Array(a.length + b.length);
  out.set(a);
  out.set(b, a.length);
  return out;
}
