// Complete a prompt greedily in node: node complete.mjs MODEL PROMPT TOKENS
import { loadModel } from './model.mjs';

const [model, prompt, tokens] = process.argv.slice(2);
if (!tokens) throw new Error('usage: node complete.mjs MODEL PROMPT TOKENS');
const complete = await loadModel(model);
console.log(await complete(prompt, Number(tokens)));
