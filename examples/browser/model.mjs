// A folder that `tinygpt2 export --to onnx` wrote: its graph, and its use in node.
import { statSync } from 'node:fs';
import { basename, dirname, join, resolve } from 'node:path';

const GRAPHS = { q8: 'model_quantized.onnx', fp32: 'model.onnx' }; // by transformers.js's names of types

/** Return the type of the folder's graph and its size in bytes. */
export function graphOf(folder) {
  for (const [dtype, file] of Object.entries(GRAPHS)) {
    const found = statSync(join(folder, 'onnx', file), { throwIfNoEntry: false });
    if (found) return { dtype, bytes: found.size };
  }
  throw new Error(`${folder} has no onnx/${Object.values(GRAPHS).join(' and no onnx/')}`);
}

/** Load the model in node; return a function that continues a prompt greedily. */
export async function loadModel(folder) {
  const { dtype } = graphOf(folder);
  const { env, pipeline } = await import('@huggingface/transformers');
  env.allowRemoteModels = false;
  env.localModelPath = dirname(resolve(folder));
  const generator = await pipeline('text-generation', basename(resolve(folder)), { dtype });
  return async (prompt, tokens) => {
    const options = { max_new_tokens: tokens, do_sample: false, return_full_text: false };
    const [answer] = await generator(prompt, options);
    return answer.generated_text;
  };
}
