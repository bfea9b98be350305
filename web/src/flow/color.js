// Colour alignment by low frequencies, flat kept flat and gray gray: engine/runtime/color.py in JavaScript.

const { fround } = Math;
export const FULL = 65535;
/** Of 3x3 samples: the most they differ by, and the most their result is off. */
const FLAT = 2 * 257;
const DILATIONS = [1, 2, 4, 8, 16];
/** How many rows away the low-pass of a row reaches. */
export const HALO = DILATIONS.reduce((a, b) => a + b);

/** Five a-trous passes of [1 2 1]/4 along rows and columns, edges replicated. [height, width], in place. */
function lowpass(plane, height, width) {
  let from = plane;
  let to = new Float32Array(plane.length);
  for (const step of DILATIONS) {
    for (let y = 0; y < height; y++) {
      const above = Math.max(y - step, 0) * width;
      const below = Math.min(y + step, height - 1) * width;
      const line = y * width;
      for (let x = 0; x < width; x++) {
        to[line + x] = from[line + x] * 0.5 + fround(fround(from[above + x] + from[below + x]) * 0.25);
      }
    }
    for (let y = 0; y < height; y++) {
      const line = y * width;
      for (let x = 0; x < width; x++) {
        const left = to[line + Math.max(x - step, 0)];
        const right = to[line + Math.min(x + step, width - 1)];
        from[line + x] = to[line + x] * 0.5 + fround(fround(left + right) * 0.25);
      }
    }
  }
  return from;
}

/**
 * Rows of a restored picture with the low frequencies of its input.
 *
 * @param {Uint16Array} result [N,W], one channel: the rows to return and HALO more at either side, where there are any.
 * @param {Float32Array} target [N,W] in [0,255], the same rows of the enlarged input, not clipped.
 * @param {number} width W.
 * @param {number} begin first row to return; @param {number} end
 * @returns {Uint16Array} [end - begin, W].
 */
export function alignRows(result, target, width, begin, end) {
  const difference = new Float32Array(result.length);
  for (let i = 0; i < result.length; i++) {
    const wanted = fround(fround(target[i] * 257) + 0.5);
    difference[i] = Math.trunc(Math.min(Math.max(wanted, 0), FULL)) - result[i];
  }
  const low = lowpass(difference, result.length / width, width);
  const out = new Uint16Array((end - begin) * width);
  for (let i = 0, from = begin * width; i < out.length; i++, from++) {
    const aligned = Math.floor(fround(fround(result[from] + low[from]) + 0.5));
    out[i] = Math.min(Math.max(aligned, 0), FULL);
  }
  return out;
}

/**
 * Where the input is flat, keep its result within FLAT of it, in place.
 *
 * @param {Uint16Array} rows [n,W], one channel of the aligned picture.
 * @param {number} first the first of these rows.
 * @param {{data: Uint8ClampedArray, width: number, height: number}} picture RGBA, 8 bit: the input.
 * @param {number} channel
 * @param {number} scale of the aligned picture.
 */
export function keepFlat(rows, first, picture, channel, scale) {
  const { data, width, height } = picture;
  const last = first + rows.length / (width * scale);
  for (let y = Math.floor(first / scale); y * scale < last; y++) {
    for (let x = 0; x < width; x++) {
      let least = FULL;
      let most = 0;
      for (let row = Math.max(y - 1, 0); row <= Math.min(y + 1, height - 1); row++) {
        for (let column = Math.max(x - 1, 0); column <= Math.min(x + 1, width - 1); column++) {
          const sample = data[(row * width + column) * 4 + channel] * 257;
          least = Math.min(least, sample);
          most = Math.max(most, sample);
        }
      }
      if (most - least > FLAT) continue;
      for (let row = Math.max(y * scale, first); row < Math.min((y + 1) * scale, last); row++) {
        const start = (row - first) * width * scale + x * scale;
        for (let i = start; i < start + scale; i++) {
          rows[i] = Math.min(Math.max(rows[i], most - FLAT), least + FLAT);
        }
      }
    }
  }
}

/** Whether R = G = B in every pixel of RGBA data. */
export function isNeutral(data) {
  for (let i = 0; i < data.length; i += 4) {
    if (data[i] !== data[i + 1] || data[i] !== data[i + 2]) return false;
  }
  return true;
}

/** Give every pixel of packed RGB its luma (ITU-R BT.601), in place. */
export function makeNeutral(rgb) {
  for (let i = 0; i < rgb.length; i += 3) {
    rgb.fill(Math.floor((rgb[i] * 299 + rgb[i + 1] * 587 + rgb[i + 2] * 114 + 500) / 1000), i, i + 3);
  }
}
