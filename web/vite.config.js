import { defineConfig } from 'vite';

// With these two headers a browser lets WebAssembly use several threads; a server that sends none gets one thread.
const headers = { 'Cross-Origin-Opener-Policy': 'same-origin', 'Cross-Origin-Embedder-Policy': 'require-corp' };

export default defineConfig({
  base: './', // the page works in any folder of a site
  assetsInclude: ['**/*.f32', '**/*.onnx'],
  build: { target: 'es2022', assetsInlineLimit: 0 },
  worker: { format: 'es' },
  server: { headers, fs: { allow: ['..'] } },
  preview: { headers },
});
