// Upscale raw RGBA by the page's own code, in Node: node upscale.mjs WIDTH HEIGHT SEED IN.rgba OUT.png
import { readFileSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { PngWriter } from '../../web/src/flow/png.js';
import { upscale } from '../../web/src/flow/upscale.js';

const ort = createRequire(new URL('../../web/package.json', import.meta.url))('onnxruntime-web');
const data = new URL('../../engine/data/', import.meta.url);
const [width, height] = process.argv.slice(2, 4).map(Number);
const [seed, input, output] = process.argv.slice(4);
const manifest = JSON.parse(readFileSync(new URL('tiny/manifest.json', data)));
const table = new Float32Array(readFileSync(new URL('normal_quantiles.f32', data)).buffer.slice(0));
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(readFileSync(new URL('tiny/generator.onnx', data)));

async function run(image, noise, h, w) {
  const { channels, factor } = manifest.geometry;
  const { output } = await session.run({
    image: new ort.Tensor('float32', image, [1, 3, h, w]),
    noise: new ort.Tensor('float32', noise, [1, channels, h / factor, w / factor]),
  });
  return output.data;
}

const picture = { data: new Uint8ClampedArray(readFileSync(input)), width, height };
const png = new PngWriter(4 * width, 4 * height);
for await (const { rgb } of upscale(picture, { manifest, table, run }, BigInt(seed))) await png.write(rgb);
writeFileSync(output, Buffer.from(await (await png.finish()).arrayBuffer()));
