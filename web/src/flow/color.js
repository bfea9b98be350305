// Colour alignment by low frequencies, and gray kept gray: engine/runtime/color.py in JavaScript.

const { fround } = Math;
export const FULL = 65535;
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
