// What all parts of the page share: nodes, messages, and requests.
export const CHANGED = "changed";
const RETRY = 700; // milliseconds until a request that did not arrive is sent again

/** @returns {any} the node of the page with an id */
export const find = (id) => document.getElementById(id);
/** @returns {any[]} the nodes of the page that a selector has */
export const findAll = (selector) => [...document.querySelectorAll(selector)];
export const hasEnded = () => document.body.dataset.state === "ended";
export const tell = (text) => Object.assign(find("error"), { textContent: text, hidden: !text });

/** @returns {any} a new node */
export function make(tag, attributes, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

export const swatch = (color, look = "") =>
  make("span", { className: `swatch ${look}`, style: color && `background: ${color}` });

// Promise true once something is done, and false if it was refused, which is then told.
export const attempt = (promise) =>
  promise.then(() => true, (error) => { tell(error.message); return false; });

// Fill a select with pairs of value and text. `other` is the text of a hidden option, CHANGED: with
// it, each of the others can be chosen again.
export function fill(select, pairs, chosen, other = "") {
  const options = pairs.map(([value, textContent]) => make("option", { value, textContent }));
  select.replaceChildren(...options);
  if (other) select.append(make("option", { value: CHANGED, textContent: other, hidden: true }));
  select.value = chosen;
}

// Show that the program has ended: nothing more is asked of it.
export function showEnd() {
  document.body.dataset.state = "ended";
  find("status").textContent = "The program has ended; this page can be closed.";
  findAll("button, input, select").forEach((node) => { node.disabled = true; });
  find("planes").inert = true;
}

// Send a request until the program answers it; what it asks for may be done twice.
async function request(address, options) {
  for (;;) {
    try {
      const answer = await fetch(address, options);
      find("connection").hidden = true;
      return answer;
    } catch (error) {
      if (hasEnded()) throw error;
      find("connection").hidden = false;
      await new Promise((done) => { setTimeout(done, RETRY); });
    }
  }
}

// Ask the program; the answer is JSON. An Error has what the program says is wrong.
export async function ask(address, sent) {
  const options = sent === undefined ? {} : { method: "POST", body: JSON.stringify(sent) };
  const answer = await request(address, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error ?? answer.statusText);
  return content;
}

// Ask for a plane: `image` as numbers, and the labels of each layer, all row by row from the top.
export async function askPlane(address) {
  const answer = await request(address, {});
  if (!answer.ok) throw new Error(answer.statusText);
  const buffer = await answer.arrayBuffer();
  const start = new Uint8Array(buffer).indexOf(10) + 1;
  const header = JSON.parse(new TextDecoder().decode(buffer.slice(0, start)));
  const size = header.rows * header.columns;
  const plane = { ...header, image: new Float32Array(buffer, start, size) };
  header.layers.forEach((name, number) => {
    plane[name] = new Uint16Array(buffer, start + size * (4 + 2 * number), size);
  });
  return plane;
}
