// What all parts of the page share: nodes, messages, and requests.
const RETRY = 700; // milliseconds until a request that did not arrive is sent again
const LATE = 4000; // milliseconds after which somebody is told of an answer that does not come
const KEPT = "What you draw is kept in this browser, and sent as soon as the program answers.";
const REMEDY = "If it has ended, start it again as before: this page goes on by itself.";
const FORBIDDEN = 403; // status of an answer: another program has this address now

/** @returns {any} the node of the page with an id */
export const find = (id) => document.getElementById(id);
/** @returns {any[]} the nodes of the page, or of a node, that a selector has */
export const findAll = (selector, node = document) => [...node.querySelectorAll(selector)];
/** @returns {any} a new `node`, that of a template with an id, and its parts by their names */
export function clone(id) {
  const node = find(id).content.firstElementChild.cloneNode(true);
  const parts = findAll("[data-part]", node).map((part) => [part.dataset.part, part]);
  return { node, ...Object.fromEntries(parts) };
}
export const hasEnded = () => document.body.dataset.state === "ended";
export const tell = (text) => Object.assign(find("error"), { textContent: text, hidden: !text });

// Put texts into the children of a node, in their order.
export function write(node, ...texts) {
  texts.forEach((text, order) => { node.children[order].textContent = text; });
  return node;
}

// Promise true once something is done, and false if it was refused, which is then told.
export const attempt = (promise) =>
  promise.then(() => true, (error) => { tell(error.message); return false; });

// Fill a select with pairs of value and text. A hidden option stays, with which each of the others
// can be chosen again.
export function fill(select, pairs, chosen) {
  const options = pairs.map(([value, text]) => new Option(text, value));
  select.replaceChildren(...findAll("[hidden]", select), ...options);
  select.value = chosen;
}

const decode = (bytes) => new TextDecoder().decode(bytes);

let lost = 0; // when the program did not answer first, in milliseconds of this page; 0: it does
let numWaiting = 0; // requests without an answer

function tellLost(why = "The program does not answer: trying again.") {
  lost ||= performance.now();
  const remedy = performance.now() - lost > LATE ? REMEDY : "";
  const node = find("connection");
  const text = `${why} ${KEPT} ${remedy}`;
  if (node.textContent !== text) node.textContent = text;
  node.hidden = false;
}

function tellFound() {
  find("connection").hidden = true;
  if (lost) window.dispatchEvent(new Event("reconnected"));
  lost = 0;
}

export const isLost = () => lost > 0;

// Tell somebody, from now on, if requests arrive but are not answered.
export const watchAnswers = () => setInterval(() => {
  if (!numWaiting || hasEnded()) return;
  fetch("alive", { signal: AbortSignal.timeout(LATE) }).then(tellFound, () => tellLost());
}, LATE);

// Send a request until its whole answer is there, and promise that; what it asks for may be done
// twice. An Error has what the program says is wrong, and the status.
async function request(address, options) {
  let answer, content;
  numWaiting += 1;
  try {
    while (!content) {
      if (hasEnded()) throw new Error("The program has ended.");
      let why;
      try {
        answer = await fetch(address, options);
        content = await answer.arrayBuffer();
        if (answer.status === FORBIDDEN) [why, content] = [decode(content), null];
      } catch { /* It is sent again. */ }
      if (content || hasEnded()) continue;
      tellLost(why);
      await new Promise((done) => { setTimeout(done, RETRY); });
    }
  } finally { numWaiting -= 1; }
  tellFound();
  if (answer.ok) return content;
  const isJson = answer.headers.get("content-type") === "application/json";
  const text = isJson ? JSON.parse(decode(content)).error : decode(content);
  throw Object.assign(new Error(text), { status: answer.status });
}

// Ask the program; the answer is JSON.
export async function ask(address, sent) {
  const body = sent && JSON.stringify(sent);
  // It arrives, too, if the page is closed at once; browsers do so for 64 kB.
  const options = sent && { method: "POST", body, keepalive: body.length < 30_000 };
  return JSON.parse(decode(await request(address, options)));
}

const KINDS = { f4: Float32Array, u2: Uint16Array, u1: Uint8Array };

// Ask for a plane: its size, and the numbers of each layer, row by row from the top.
export async function askPlane(address) {
  const buffer = await request(address);
  let start = new Uint8Array(buffer).indexOf(10) + 1;
  const plane = JSON.parse(decode(buffer.slice(0, start)));
  for (const [name, kind] of plane.layers) {
    plane[name] = new KINDS[kind](buffer, start, plane.rows * plane.columns);
    start += plane[name].byteLength;
  }
  return plane;
}
