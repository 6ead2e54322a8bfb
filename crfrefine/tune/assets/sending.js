// Changes of strokes, notes and parameters. They are sent one after the other, and kept in this
// browser until the program has them: it may end, and be started again.
import { ask, attempt, hasEnded } from "./page.js";

const GONE = 404; // status of an answer: the program does not have the case

let sent = Promise.resolve(); // the changes before
let numSent = 0; // on their way
/** @type {string[]} */
const unwritten = []; // keys of changes that the program has, but could not write yet

// The keys of the changes of this page that are kept. Its address stays that of its folder.
const keptKeys = () =>
  Object.keys(localStorage).filter((key) => key.startsWith(location.pathname)).sort();

// Keep a change in this browser, and return its key; "" if the browser does not keep it.
function keep(change) {
  try {
    const last = keptKeys().at(-1) ?? "";
    const number = (parseInt(last.slice(location.pathname.length), 10) || 0) + 1;
    const key = location.pathname + String(number).padStart(9, "0") + crypto.randomUUID();
    localStorage.setItem(key, JSON.stringify(change));
    return key;
  } catch { return ""; }
}

function forget(keys) {
  for (const key of keys.filter(Boolean)) localStorage.removeItem(key);
}

function confirm(key, problem) {
  if (problem) unwritten.push(key);
  else forget([key]);
  if (problem === "") forget(unwritten.splice(0));
}

function forward({ address, content }, key) {
  numSent += 1;
  const answer = sent.then(() => ask(address, content));
  sent = answer.then(({ problem }) => confirm(key, problem), ({ status }) => {
    if (status !== GONE && !hasEnded()) forget([key]);
  }).finally(() => { numSent -= 1; });
  return answer;
}

// Change something, after all changes before; promise the answer.
export const send = (address, content) => forward({ address, content }, "");

// Change something of a case, which is kept until the program has it.
export const sendKept = (address, content) =>
  forward({ address, content }, keep({ address, content }));

// Send what an earlier page could not send.
export function sendRest() {
  for (const key of keptKeys()) attempt(forward(JSON.parse(localStorage.getItem(key)), key));
}

export const allSent = () => sent;
export const isSending = () => numSent > 0;
