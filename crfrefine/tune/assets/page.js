// What all parts of the page share: nodes, messages, and requests.
const RETRY = 700; // milliseconds until a request that did not arrive is sent again

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

// Send a request until its whole answer is there, and promise that; what it asks for may be done
// twice. An Error has what the program says is wrong.
async function request(address, options) {
  let answer, content;
  while (!content) {
    try {
      if (hasEnded()) throw new Error("The program has ended.");
      answer = await fetch(address, options);
      content = await answer.arrayBuffer();
    } catch (error) {
      if (hasEnded()) throw error;
      find("connection").hidden = false;
      await new Promise((done) => { setTimeout(done, RETRY); });
    }
  }
  find("connection").hidden = true;
  if (answer.ok) return content;
  const isJson = answer.headers.get("content-type") === "application/json";
  throw new Error(isJson ? JSON.parse(decode(content)).error : decode(content));
}

// Ask the program; the answer is JSON.
export async function ask(address, sent) {
  const body = sent && JSON.stringify(sent);
  // It arrives, too, if the page is closed at once; browsers do so for 64 kB.
  const options = sent && { method: "POST", body, keepalive: body.length < 30_000 };
  return JSON.parse(decode(await request(address, options)));
}

let sent = Promise.resolve(); // the changes before
let numSent = 0; // on their way

// Change something, after all changes before; promise the answer.
export function send(address, content) {
  numSent += 1;
  const answer = sent.then(() => ask(address, content));
  sent = answer.catch(() => {}).finally(() => { numSent -= 1; });
  return answer;
}

export const allSent = () => sent;
export const isSending = () => numSent > 0;

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
