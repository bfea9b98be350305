// Overlapping tiles, blended smoothly: engine/runtime/tiles.py in JavaScript. Lengths are in latent pixels.

/** Tiles along one axis: what they cover, the length of each, where they begin, and their least overlap. */
export class Axis {
  constructor(size, tile, starts, overlap) {
    Object.assign(this, { size, tile, starts, overlap });
  }

  /** Each tile's share of each of its samples, `resolution` a latent pixel: one Float32Array a tile. */
  weights(resolution) {
    const length = this.tile * resolution;
    const margin = Math.floor((this.overlap * resolution) / 4);
    const span = Math.max(this.overlap * resolution - 2 * margin, 1);
    const ramp = Float64Array.from({ length }, (_, i) => {
      const t = Math.min(Math.max((i + 0.5 - margin) / span, 0), 1);
      return t * t * (3 - 2 * t);
    });
    const total = new Float64Array((this.starts.at(-1) + this.tile) * resolution);
    const shares = this.starts.map((start, tile) => {
      const share = new Float64Array(length).fill(1);
      for (let i = 0; i < length; i++) {
        if (tile > 0) share[i] *= ramp[i];
        if (tile + 1 < this.starts.length) share[i] *= ramp[length - 1 - i];
        total[start * resolution + i] += share[i];
      }
      return share;
    });
    return shares.map((share, tile) =>
      Float32Array.from(share, (value, i) => value / total[this.starts[tile] * resolution + i]),
    );
  }
}

/** Cover `size` with tiles of at most `tile`, which start and end at multiples of `multiple`. */
export function cover(size, tile, overlap, multiple) {
  const whole = Math.ceil(size / multiple);
  let longest = Math.floor(tile / multiple);
  const shared = Math.ceil(overlap / multiple);
  if (whole <= longest) return new Axis(size, whole * multiple, [0], overlap);
  const count = Math.ceil((whole - shared) / (longest - shared));
  longest = Math.ceil((whole + (count - 1) * shared) / count);
  const starts = Array.from(
    { length: count },
    (_, i) => Math.floor((i * (whole - longest)) / (count - 1)) * multiple,
  );
  return new Axis(size, longest * multiple, starts, overlap);
}

/**
 * Run every tile and yield finished bands, from the top to the bottom.
 *
 * @param {Axis} rows
 * @param {Axis} columns
 * @param {number} factor samples of a result for each latent pixel.
 * @param {(top: number, left: number) => Promise<Float32Array>} run gives a tile, [3,h,w].
 * @yields {{first: number, count: number, width: number, planes: Float32Array[]}} three planes of `count` rows or more
 *     in samples; they are overwritten when the next band is asked for.
 */
export async function* blend(rows, columns, factor, run) {
  const { fround } = Math;
  const down = rows.weights(factor);
  const across = columns.weights(factor);
  const tall = rows.tile * factor;
  const wide = columns.tile * factor;
  const width = (columns.starts.at(-1) + columns.tile) * factor;
  const planes = [0, 1, 2].map(() => new Float32Array(tall * width));
  for (const [i, top] of rows.starts.entries()) {
    for (const [j, left] of columns.starts.entries()) {
      const tile = await run(top, left);
      planes.forEach((plane, c) => {
        for (let y = 0; y < tall; y++) {
          const from = (c * tall + y) * wide;
          const to = y * width + left * factor;
          for (let x = 0; x < wide; x++) plane[to + x] += fround(fround(tile[from + x] * across[j][x]) * down[i][y]);
        }
      });
    }
    const first = top * factor;
    const last = i + 1 === rows.starts.length;
    const done = last ? tall : (rows.starts[i + 1] - top) * factor;
    yield { first, count: Math.min(done, rows.size * factor - first), width, planes };
    if (!last) {
      for (const plane of planes) {
        plane.copyWithin(0, done * width);
        plane.fill(0, (tall - done) * width);
      }
    }
  }
}
