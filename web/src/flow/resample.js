// The resampler (bicubic, a = -0.5): engine/runtime/resample.py in JavaScript, with its order of float32 operations.

const { fround } = Math;

/**
 * The filter that takes a line of `size` samples to `newSize`.
 *
 * @returns {{first: Int32Array, weights: Float32Array, count: number}} output i reads samples first[i] ... + count - 1
 *     with weights[i * count ...].
 */
export function taps(size, newSize) {
  const scale = size / newSize;
  const stretch = Math.max(scale, 1);
  const first = new Int32Array(newSize);
  const last = new Int32Array(newSize);
  let count = 0;
  for (let i = 0; i < newSize; i++) {
    const center = (i + 0.5) * scale;
    first[i] = Math.max(Math.floor(center - 2 * stretch + 0.5), 0);
    last[i] = Math.min(Math.floor(center + 2 * stretch + 0.5), size);
    count = Math.max(count, last[i] - first[i]);
  }
  const weights = new Float32Array(newSize * count);
  const line = new Float64Array(count);
  for (let i = 0; i < newSize; i++) {
    const center = (i + 0.5) * scale;
    let total = 0;
    for (let k = 0; k < count; k++) {
      const position = first[i] + k;
      line[k] = position < last[i] ? cubic(Math.abs((position - center + 0.5) / stretch)) : 0;
      total += line[k];
    }
    for (let k = 0; k < count; k++) weights[i * count + k] = line[k] / total;
  }
  return { first, weights, count };
}

function cubic(t) {
  const a = -0.5;
  if (t < 1) return ((a + 2) * t - (a + 3)) * t * t + 1;
  return t < 2 ? (((t - 5) * t + 8) * t - 4) * a : 0;
}

/** Fold an index beyond a line back into it, as between two mirrors. */
export function reflect(index, size) {
  const period = 2 * size;
  const inside = ((index % period) + period) % period;
  return Math.min(inside, period - 1 - inside);
}

/** Windows of one picture enlarged by a whole factor. */
export class Resampler {
  /**
   * @param {{data: Uint8ClampedArray, width: number, height: number}} picture RGBA, 8 bit.
   * @param {number} scale
   */
  constructor(picture, scale) {
    this.picture = picture;
    this.height = picture.height * scale;
    this.width = picture.width * scale;
    this.down = taps(picture.height, this.height);
    this.across = taps(picture.width, this.width);
  }

  /**
   * Beyond the enlarged picture it continues mirrored.
   *
   * @returns {Float32Array} [3, height, width] in [0,255], not clipped: a cubic overshoots.
   */
  window(top, height, left, width) {
    const { picture, down, across } = this;
    const rows = Int32Array.from({ length: height }, (_, i) => reflect(top + i, this.height));
    const columns = Int32Array.from({ length: width }, (_, i) => reflect(left + i, this.width));
    let low = picture.height;
    let high = 0;
    for (const y of rows) {
      low = Math.min(low, down.first[y]);
      high = Math.max(high, down.first[y] + down.count);
    }
    high = Math.min(high, picture.height);

    const source = picture.data;
    const narrow = new Float32Array(3 * (high - low) * width);
    for (let c = 0; c < 3; c++) {
      for (let y = low; y < high; y++) {
        const line = y * picture.width;
        const to = (c * (high - low) + y - low) * width;
        for (let i = 0; i < width; i++) {
          const x = columns[i];
          let total = 0;
          for (let k = 0; k < across.count; k++) {
            // A tap past the end has weight 0: which sample it reads does not matter.
            const from = Math.min(across.first[x] + k, picture.width - 1);
            total = fround(total + fround(source[(line + from) * 4 + c] * across.weights[x * across.count + k]));
          }
          narrow[to + i] = total;
        }
      }
    }

    const out = new Float32Array(3 * height * width);
    for (let c = 0; c < 3; c++) {
      const plane = c * (high - low);
      for (let i = 0; i < height; i++) {
        const y = rows[i];
        const to = (c * height + i) * width;
        for (let k = 0; k < down.count; k++) {
          const weight = down.weights[y * down.count + k];
          const from = (plane + Math.min(down.first[y] + k, picture.height - 1) - low) * width;
          for (let x = 0; x < width; x++) out[to + x] += fround(narrow[from + x] * weight);
        }
      }
    }
    return out;
  }
}
