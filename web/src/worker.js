// The model, off the page's thread: a photo in, progress and a PNG out. Nothing is sent anywhere.
import manifest from '../../engine/data/tiny/manifest.json';
import modelUrl from '../../engine/data/tiny/generator.onnx?url';
import tableUrl from '../../engine/data/normal_quantiles.f32?url';
import gpuWasmUrl from 'onnxruntime-web/ort-wasm-simd-threaded.asyncify.wasm?url';
import cpuWasmUrl from 'onnxruntime-web/ort-wasm-simd-threaded.wasm?url';
import { PngWriter } from './flow/png.js';
import { upscale } from './flow/upscale.js';

async function load(url) {
  const reply = await fetch(url);
  if (!reply.ok) throw new Error(`${url}: the server answered ${reply.status}; reload the page.`);
  return reply.arrayBuffer();
}

async function hasWebGpu() {
  try {
    return Boolean(await navigator.gpu?.requestAdapter());
  } catch {
    return false;
  }
}

async function openSession(device, bytes) {
  const gpu = device === 'webgpu';
  const ort = await (gpu ? import('onnxruntime-web/webgpu') : import('onnxruntime-web/wasm'));
  ort.env.wasm.wasmPaths = { wasm: new URL(gpu ? gpuWasmUrl : cpuWasmUrl, self.location.href).href };
  const session = await ort.InferenceSession.create(bytes, { executionProviders: [device] });
  const { channels, factor } = manifest.geometry;
  return async (image, noise, height, width) => {
    const { output } = await session.run({
      image: new ort.Tensor('float32', image, [1, 3, height, width]),
      noise: new ort.Tensor('float32', noise, [1, channels, height / factor, width / factor]),
    });
    const data = await output.getData();
    output.dispose();
    return data;
  };
}

/** The model on a GPU where there is one and it gives a small tile; otherwise on the CPU, and why. */
async function openModel(wanted) {
  const [bytes, table] = await Promise.all([load(modelUrl), load(tableUrl)]);
  const { channels, factor } = manifest.geometry;
  const side = manifest.profile.tile[0];
  let why = wanted === 'wasm' ? 'as ?device=wasm says' : (await hasWebGpu()) ? '' : 'this browser offers no WebGPU';
  for (const device of why ? ['wasm'] : ['webgpu', 'wasm']) {
    try {
      const run = await openSession(device, new Uint8Array(bytes));
      const noise = new Float32Array(channels * (side / factor) ** 2);
      const output = await run(new Float32Array(3 * side * side), noise, side, side);
      if (!output.every(Number.isFinite)) throw new Error('values that are not finite');
      return { device, why, model: { manifest, table: new Float32Array(table), run } };
    } catch (error) {
      if (device === 'wasm') throw error;
      why = "this browser's WebGPU cannot run the model";
      console.warn(`${why}: ${error.message}`);
    }
  }
}

/** RGBA pixels in sRGB, upright, on white where the photo is transparent. */
async function decode(file) {
  const bitmap = await createImageBitmap(file);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
  context.fillStyle = 'white';
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

/** One line. */
function reason(error, name) {
  const text = String(error.message || error).split('\n')[0];
  const memory = error instanceof RangeError || /memory|allocat/i.test(text);
  return memory ? `${name}: this browser has not enough memory for it; use the command line or a smaller copy.` : text;
}

let opened;

self.onmessage = async ({ data: { file, seed, wanted } }) => {
  try {
    opened ??= openModel(wanted);
    const { device, why, model } = await opened;
    self.postMessage({ kind: 'ready', device, why });
    const picture = await decode(file);
    const { scale } = manifest.geometry;
    const png = new PngWriter(picture.width * scale, picture.height * scale);
    const progress = (done, total) => self.postMessage({ kind: 'progress', done, total });
    for await (const { rgb } of upscale(picture, model, seed, progress)) await png.write(rgb);
    self.postMessage({ kind: 'done', blob: await png.finish() });
  } catch (error) {
    opened = undefined;
    self.postMessage({ kind: 'failed', message: reason(error, file.name) });
  }
};
