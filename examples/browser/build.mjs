// Build the page: node build.mjs MODEL, where `tinygpt2 export --to onnx` wrote the folder MODEL.
// Everything that the page loads is put into dist/.
import { cp, rm } from 'node:fs/promises';
import { createRequire } from 'node:module';
import { build } from 'esbuild';
import { graphOf } from './model.mjs';

const model = process.argv[2];
if (!model) throw new Error('usage: node build.mjs MODEL');
const { dtype, bytes } = graphOf(model);

// onnxruntime-web's build for the CPU alone is half as large as the one with GPUs that transformers.js imports.
const wasm = 'ort-wasm-simd-threaded.wasm';
const transformers = createRequire(import.meta.url).resolve('@huggingface/transformers');

await rm('dist', { recursive: true, force: true });
await cp(model, 'dist/models/student', { recursive: true });
await cp('page/index.html', 'dist/index.html');
await cp('page/style.css', 'dist/style.css');
await cp(createRequire(transformers).resolve(`onnxruntime-web/${wasm}`), `dist/${wasm}`);
await build({
  entryPoints: ['page/page.js', 'page/worker.js'],
  outdir: 'dist',
  bundle: true,
  minify: true,
  format: 'esm',
  alias: { 'onnxruntime-web/webgpu': 'onnxruntime-web/wasm' },
  define: { DTYPE: JSON.stringify(dtype), BYTES: JSON.stringify(bytes), WASM: JSON.stringify(wasm) },
});
console.log(`dist/ holds the page and the model in ${dtype}`);
