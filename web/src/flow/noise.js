// Standard normal noise as a pure function of (seed, channel, row, column): engine/runtime/noise.py in JavaScript.

const M0 = 0xd2511f53;
const M1 = 0xcd9e8d57;
const W0 = 0x9e3779b9;
const W1 = 0xbb67ae85;

/** The high 32 bits of a 32x32-bit product. */
function mulHigh(a, b) {
  const aLow = a & 0xffff;
  const aHigh = a >>> 16;
  const bLow = b & 0xffff;
  const bHigh = b >>> 16;
  const middle = aHigh * bLow + ((aLow * bLow) >>> 16);
  const middleLow = (middle % 0x10000) + aLow * bHigh;
  return (aHigh * bHigh + Math.floor(middle / 0x10000) + Math.floor(middleLow / 0x10000)) >>> 0;
}

/**
 * Philox4x32-10.
 *
 * @param {Uint32Array} words the counter, 4 words; the result replaces it.
 * @param {number} low the low 32 bits of the seed.
 * @param {number} high its high 32 bits.
 */
export function philox(words, low, high) {
  let [c0, c1, c2, c3] = words;
  let k0 = low;
  let k1 = high;
  for (let round = 0; round < 10; round++) {
    const high0 = mulHigh(M0, c0);
    const low0 = Math.imul(M0, c0);
    const high1 = mulHigh(M1, c2);
    const low1 = Math.imul(M1, c2);
    c0 = (high1 ^ c1 ^ k0) >>> 0;
    c1 = low1 >>> 0;
    c2 = (high0 ^ c3 ^ k1) >>> 0;
    c3 = low0 >>> 0;
    k0 = (k0 + W0) >>> 0;
    k1 = (k1 + W1) >>> 0;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

/**
 * A window of the endless field of standard normals that a seed names.
 *
 * @param {Float32Array} table 2^16 normal quantiles: engine/data/normal_quantiles.f32.
 * @param {bigint} seed 0 <= seed < 2^64.
 * @param {number} channels C >= 1.
 * @param {number} top first row; @param {number} height
 * @param {number} left first column; @param {number} width
 * @returns {Float32Array} [C, height, width].
 */
export function noiseField(table, seed, channels, top, height, left, width) {
  const low = Number(seed & 0xffffffffn);
  const high = Number(seed >> 32n);
  const area = height * width;
  const field = new Float32Array(channels * area);
  const words = new Uint32Array(4);
  for (let first = 0; first < channels; first += 8) {
    const halves = Math.min(8, channels - first);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        words[0] = left + x;
        words[1] = top + y;
        words[2] = first / 8;
        words[3] = 0;
        philox(words, low, high);
        let at = first * area + y * width + x;
        for (let half = 0; half < halves; half++, at += area) {
          const word = words[half >> 1];
          field[at] = table[half & 1 ? word >>> 16 : word & 0xffff];
        }
      }
    }
  }
  return field;
}
