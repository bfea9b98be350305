// Upscale a picture through the C interface: node upscale.mjs FOLDER in.ppm out.ppm   (npm install koffi)
import { readFileSync, writeFileSync } from 'node:fs';
import koffi from 'koffi';

const library = koffi.load(process.env.GDPO_LIBRARY ?? 'libgdpo.so');
koffi.opaque('gdpo_upscaler');
koffi.struct('gdpo_image', {
  struct_size: 'size_t', data: 'void *', bytes: 'size_t', height: 'int64_t', width: 'int64_t',
  row_stride: 'int64_t', column_stride: 'int64_t', channel_stride: 'int64_t', channels: 'int', sample: 'int',
});
const image = library.func('gdpo_image gdpo_image_packed(void *data, int64_t height, int64_t width, int sample)');
const load = library.func('int gdpo_load(const char *folder, const void *options, _Out_ gdpo_upscaler **out)');
const upscale = library.func(
  'int gdpo_upscale(const gdpo_upscaler *up, const gdpo_image *in, const gdpo_image *out, const void *request)',
);
const lastError = library.func('const char *gdpo_last_error()');

function check(status) {
  if (status !== 0) throw new Error(lastError());
}

const [folder, input, output] = process.argv.slice(2);
const file = readFileSync(input);
const [, width, height] = file.toString('latin1', 0, 40).split(/\s+/).map(Number);
const rgb = file.subarray(-width * height * 3);
const out = Buffer.alloc(rgb.length * 16);
const up = [null];
check(load(folder, null, up));
check(upscale(up[0], image(rgb, height, width, 0), image(out, 4 * height, 4 * width, 0), null));
writeFileSync(output, Buffer.concat([Buffer.from(`P6\n${4 * width} ${4 * height}\n255\n`), out]));
