// The page: a photo chosen, its size checked, a worker started, before and after shown.
import 'img-comparison-slider';
import 'img-comparison-slider/dist/styles.css';
import './style.css';
import { check } from './limits.js';

const part = (id) => document.getElementById(id);
const wanted = new URLSearchParams(location.search).get('device'); // ?device=wasm: not the GPU
let worker;
let busy = false;
let urls = [];
let photo;

part('unloaded').remove();

function show(state) {
  document.body.dataset.state = state; // start, working, done, failed: style.css shows the parts of each
}

function stop() {
  if (busy) worker?.terminate(); // what it was doing cannot be interrupted otherwise
  if (busy) worker = undefined;
  busy = false;
}

function fail(message) {
  stop();
  part('error').textContent = message;
  show('failed');
}

/** Width and height of an upright picture. The browser reads no more of it than its header for this. */
async function sizeOf(url) {
  const image = new Image();
  await new Promise((resolve, reject) => {
    image.onload = resolve;
    image.onerror = reject;
    image.src = url;
  });
  return [image.naturalWidth, image.naturalHeight];
}

async function start(file) {
  stop();
  urls.forEach((url) => URL.revokeObjectURL(url));
  urls = [URL.createObjectURL(file)];
  photo = file;
  part('bar').removeAttribute('value');
  part('status').textContent = `Reading ${file.name} …`;
  show('working');
  let seed;
  let size;
  try {
    size = await sizeOf(urls[0]).catch(() => undefined);
    seed = check(file.name, size, part('seed').value);
  } catch (error) {
    fail(error.message);
    return;
  }
  const [width, height] = size;
  part('before').src = urls[0];
  part('slider').style.setProperty('--aspect', width / height);
  part('status').textContent = 'Loading the model …';
  busy = true;
  const begin = performance.now();
  worker ??= new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
  worker.onerror = (event) => fail(event.message || 'The model could not be loaded; reload the page.');
  worker.onmessage = ({ data }) => {
    if (data.kind === 'ready') {
      part('device').textContent = data.device === 'webgpu' ? 'on the GPU (WebGPU)' : `on the CPU: ${data.why}`;
      document.body.dataset.device = data.device;
    } else if (data.kind === 'progress') {
      const left = ((performance.now() - begin) / data.done) * (data.total - data.done);
      part('bar').value = data.done / data.total;
      part('status').textContent = `Tile ${data.done} of ${data.total}, about ${clock(left)} left`;
    } else if (data.kind === 'failed') {
      fail(data.message);
    } else {
      busy = false;
      urls.push(URL.createObjectURL(data.blob));
      part('after').src = urls[1];
      const download = part('download');
      download.href = urls[1];
      download.download = `${file.name.replace(/\.[^.]*$/, '')}-x4.png`;
      download.textContent = `Download PNG (${4 * width} × ${4 * height}, ${(data.blob.size / 1e6).toFixed(1)} MB)`;
      part('status').textContent = `${width} × ${height} made ×4 in ${clock(performance.now() - begin)}`;
      show('done');
    }
  };
  worker.postMessage({ file, seed, wanted });
}

function clock(milliseconds) {
  const seconds = Math.ceil(milliseconds / 1000);
  return seconds < 60 ? `${seconds} s` : `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
}

part('file').addEventListener('change', ({ target }) => {
  if (target.files.length) start(target.files[0]);
  target.value = ''; // the same file may be chosen again
});
part('cancel').addEventListener('click', () => {
  stop();
  show('start');
});
part('again').addEventListener('click', () => start(photo));
for (const type of ['dragover', 'drop', 'paste']) {
  document.addEventListener(type, (event) => {
    const files = (event.dataTransfer ?? event.clipboardData)?.files;
    if (type !== 'paste') event.preventDefault();
    if (type !== 'dragover' && files?.length) start(files[0]);
  });
}
