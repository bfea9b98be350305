// What the page accepts. What it does not is an Error of one sentence.

/** Megapixels of a photo. Its x4 has 16 times as many, and a browser holds about 256. */
export const MOST = 16;

/**
 * @param {string} name of the file.
 * @param {[number, number] | undefined} size width and height; undefined where the browser could not read it.
 * @param {string} seed as typed; empty is 0.
 * @returns {bigint} the seed.
 */
export function check(name, size, seed) {
  if (!size || !size[0] || !size[1]) {
    throw new Error(`${name} is no picture that this browser reads; choose a JPEG, PNG, WebP or AVIF file.`);
  }
  const [width, height] = size;
  const megapixels = (width * height) / 1e6;
  if (megapixels > MOST) {
    throw new Error(
      `${name} has ${megapixels.toFixed(megapixels < 20 ? 1 : 0)} megapixels (${width} × ${height}), and this page ` +
        `takes up to ${MOST}; use the command line, gdpo-upscale, or a smaller copy.`,
    );
  }
  if (!/^\d{0,20}$/.test(seed.trim()) || BigInt(seed.trim() || '0') >= 1n << 64n) {
    throw new Error(`The seed must be a whole number from 0 to 18446744073709551615; it is "${seed}".`);
  }
  return BigInt(seed.trim() || '0');
}
