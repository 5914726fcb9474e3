// The page: it shows what the worker says. The model runs in the worker, so that the page never stands still.
const byId = (id) => document.getElementById(id);
const button = document.querySelector('button');
let worker;
let written; // the part of the text that the model writes

function start() {
  worker = new Worker('worker.js', { type: 'module' });
  worker.onmessage = ({ data }) => answers[data.kind](data);
  worker.onerror = (event) => answers.failed({ message: event.message });
}

function free() {
  button.textContent = 'Complete';
  button.disabled = false;
}

const answers = {
  loaded({ layers, width, vocabulary }) {
    const depth = `${layers} ${layers === 1 ? 'layer' : 'layers'} of width ${width}`;
    const tokens = `vocabulary of ${vocabulary.toLocaleString('en')}`;
    byId('about').textContent = `${depth}, ${tokens}, ${(BYTES / 1e6).toFixed(1)}\u00a0MB, running in this browser`;
    free();
  },
  piece({ text }) {
    written.append(text);
  },
  done({ tokens, seconds }) {
    byId('speed').textContent = `${tokens} tokens, ${Math.round(tokens / seconds)} per second`;
    free();
  },
  failed({ message }) {
    byId('speed').textContent = message;
    byId('speed').className = 'error';
    free();
  },
};

document.querySelector('form').addEventListener('submit', (event) => {
  event.preventDefault();
  if (button.textContent === 'Stop') {
    worker.terminate(); // a worker that computes hears nothing: a new one loads the model again
    button.disabled = true;
    start();
    return;
  }
  const prompt = byId('prompt').value;
  const given = document.createElement('span');
  given.className = 'prompt';
  given.textContent = prompt;
  written = document.createElement('span');
  byId('text').replaceChildren(given, written);
  byId('speed').textContent = '';
  byId('speed').className = '';
  button.textContent = 'Stop';
  worker.postMessage({ prompt, tokens: byId('tokens').valueAsNumber, temperature: byId('temperature').valueAsNumber });
});

start();
