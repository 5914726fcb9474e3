// Complete prompts in node and in the built page, and compare with Python's texts: node check.mjs EXPECTED.json
//
// EXPECTED.json holds `prompts`, `tokens`, the folders of models to run in node (`node`), the one that the page was
// built with (`page`), and the greedy texts of each folder (`texts`). The variable CHROMIUM names the browser.
// Pictures of the page go into check/.
import { mkdir, readFile } from 'node:fs/promises';
import { createServer } from 'node:http';
import { extname, join } from 'node:path';
import { text } from 'node:stream/consumers';
import puppeteer from 'puppeteer-core';
import { loadModel } from './model.mjs';

const TYPES = {
  '.css': 'text/css',
  '.html': 'text/html',
  '.js': 'text/javascript',
  '.json': 'application/json',
  '.wasm': 'application/wasm',
};
// A request to anywhere else is against this policy, for the page and for its worker. Chromium reports it to /report.
const POLICY = "default-src 'self' data:; script-src 'self' 'wasm-unsafe-eval'; report-uri /report";
const PATIENCE = { timeout: 60_000 };

const problems = [];
const compare = (where, found, expected) => {
  if (found !== expected) problems.push(`${where}: ${JSON.stringify(found)}, expected ${JSON.stringify(expected)}`);
};

async function checkNode({ prompts, tokens, node, texts }) {
  for (const folder of node) {
    const complete = await loadModel(folder);
    for (const [index, prompt] of prompts.entries()) {
      compare(`node, ${folder}, ${prompt}`, await complete(prompt, tokens), texts[folder][index]);
    }
  }
}

/** Serve dist/ on a free port. */
async function serve() {
  const server = createServer(async (request, response) => {
    const { pathname } = new URL(request.url, 'http://localhost');
    if (pathname === '/report') {
      const report = JSON.parse(await text(request))['csp-report'];
      problems.push(`a request to ${report['blocked-uri']}, against ${report['effective-directive']}`);
      response.writeHead(204).end();
      return;
    }
    const file = join('dist', pathname === '/' ? 'index.html' : pathname);
    try {
      const content = await readFile(file);
      const type = TYPES[extname(file)] ?? 'application/octet-stream';
      response.writeHead(200, { 'Content-Type': type, 'Content-Security-Policy': POLICY }).end(content);
    } catch {
      problems.push(`${pathname} was not found`);
      response.writeHead(404).end();
    }
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  return server;
}

/** Fill in the form, press the button, and return the completed text and the line below it. */
async function complete(page, prompt, tokens, temperature) {
  for (const [id, value] of Object.entries({ prompt, tokens, temperature })) {
    await page.$eval(`#${id}`, (box, value) => (box.value = value), value);
  }
  await page.click('button');
  await page.waitForFunction(() => document.querySelector('#speed').textContent !== '', PATIENCE);
  return page.$$eval('#text, #speed', (found) => found.map((one) => one.textContent));
}

async function checkPage({ prompts, tokens, page: folder, texts }, address) {
  const browser = await puppeteer.launch({
    executablePath: process.env.CHROMIUM,
    args: process.getuid?.() === 0 ? ['--no-sandbox'] : [],
  });
  try {
    const page = await browser.newPage();
    page.on('console', (message) => {
      if (['error', 'warn', 'assert'].includes(message.type())) problems.push(`the console: ${message.text()}`);
    });
    page.on('pageerror', (error) => problems.push(`an exception: ${error}`));
    await page.setViewport({ width: 900, height: 720 });
    await page.goto(address);
    await page.waitForFunction(() => !document.querySelector('button').disabled, PATIENCE);
    for (const [index, prompt] of prompts.entries()) {
      const [shown] = await complete(page, prompt, tokens, 0);
      compare('the page', shown, prompt + texts[folder][index]);
    }
    const [sampled, speed] = await complete(page, prompts[0], tokens, 0.7);
    if (sampled.length <= prompts[0].length) problems.push('the page sampled nothing');
    console.log(`the page: ${speed}`);

    await mkdir('check', { recursive: true });
    await page.screenshot({ path: 'check/page.png' });
    await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: 'dark' }]);
    await page.setViewport({ width: 390, height: 800 });
    await page.screenshot({ path: 'check/phone.png' });
    const [, refusal] = await complete(page, 'word '.repeat(5000), tokens, 0);
    if (!refusal.startsWith('The prompt has')) problems.push(`the page takes a prompt that is too long: ${refusal}`);
  } finally {
    await browser.close();
  }
}

if (process.argv.length !== 3) throw new Error('usage: node check.mjs EXPECTED.json');
const expected = JSON.parse(await readFile(process.argv[2], 'utf8'));
await checkNode(expected);
const server = await serve();
await checkPage(expected, `http://127.0.0.1:${server.address().port}`);
server.close();
for (const problem of problems) console.error(problem);
process.exitCode = problems.length ? 1 : 0;
