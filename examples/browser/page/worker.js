// The worker: loads the model that lies beside the page, and continues prompts.
import { env, pipeline, TextStreamer } from '@huggingface/transformers';

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = './models/';
env.useBrowserCache = false; // the browser's own cache notices a model that has changed
env.backends.onnx.wasm.wasmPaths = { wasm: new URL(WASM, self.location.href).href };

const loading = pipeline('text-generation', 'student', { dtype: DTYPE, device: 'wasm' });

async function complete({ prompt, tokens, temperature }) {
  const { model, tokenizer } = await loading;
  const inputs = tokenizer(prompt);
  const length = inputs.input_ids.dims[1];
  const positions = model.config.n_positions;
  if (length >= positions) {
    throw new Error(`The prompt has ${length} tokens. The model reads at most ${positions - 1}.`);
  }
  let count = 0;
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (text) => self.postMessage({ kind: 'piece', text }),
    token_callback_function: () => (count += 1),
  });
  const started = performance.now();
  await model.generate({
    ...inputs,
    streamer,
    max_new_tokens: Math.min(tokens, positions - length),
    do_sample: temperature > 0,
    ...(temperature > 0 && { temperature }),
  });
  self.postMessage({ kind: 'done', tokens: count, seconds: (performance.now() - started) / 1000 });
}

const failed = (error) => self.postMessage({ kind: 'failed', message: error.message });
self.onmessage = ({ data }) => complete(data).catch(failed);
loading
  .then(({ model: { config } }) =>
    self.postMessage({
      kind: 'loaded',
      layers: config.n_layer,
      width: config.n_embd,
      vocabulary: config.vocab_size,
    }),
  )
  .catch(failed);
