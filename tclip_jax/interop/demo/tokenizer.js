// CLIP's byte-pair tokenizer: the ids of tclip_jax's Tokenizer. Only mojibake, which ftfy repairs there, stays as it is.

const START = 49406;
const END = 49407;
const WORDS = /'[sſ]|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^ \p{L}\p{N}]+/gu;
const SPACES = /[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/;

const windows1252 = new TextDecoder("windows-1252");
const entities = document.createElement("textarea");

/** Return a function from a text to its ids: start, the text, end; at most as many as the context has. */
export function makeTokenizer({ model: { vocab, merges } }, contextLength) {
  const ranks = new Map(merges.map((pair, rank) => [Array.isArray(pair) ? pair.join(" ") : pair, rank]));
  const letters = byteLetters();
  const known = new Map();

  function encodeWord(word) {
    if (known.has(word)) return known.get(word);
    let parts = [...new TextEncoder().encode(word)].map((byte) => letters[byte]);
    parts[parts.length - 1] += "</w>";
    while (parts.length > 1) {
      const rank = (i) => ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
      let best = 0;
      for (let i = 1; i < parts.length - 1; i++) if (rank(i) < rank(best)) best = i;
      if (rank(best) === Infinity) break;
      const [left, right] = [parts[best], parts[best + 1]];
      const merged = [];
      for (let i = 0; i < parts.length; i++) {
        const here = parts[i] === left && parts[i + 1] === right;
        merged.push(here ? left + right : parts[i]);
        i += here;
      }
      parts = merged;
    }
    const ids = parts.map((part) => vocab[part]);
    known.set(word, ids);
    return ids;
  }

  return (text) => {
    const ids = (clean(text).match(WORDS) ?? []).flatMap(encodeWord).slice(0, contextLength - 2);
    return [START, ...ids, END];
  };
}

/** Clean a text as CLIP does: repair it, decode HTML entities, collapse white space, lower the case. */
export function clean(text) {
  return unescape(unescape(repair(text))).split(SPACES).filter(Boolean).join(" ").toLowerCase();
}

/** What ftfy.fix_text does line by line, but for mojibake. */
function repair(text) {
  let decodes = true;
  const repaired = text.split(/(?<=\n)/).map((line) => {
    decodes &&= !line.includes("<"); // the text seems to be HTML, in which entities are meant
    for (let before; before !== line; ) {
      before = line;
      if (decodes) line = line.replace(/&#?[0-9A-Za-z]{1,24};/g, unescapeWhole);
      line = line
        .replace(/[\x80-\x9f]/g, fromWindows)
        .replace(/ﬅ/g, "ſt")
        .replace(/[ĲĳŉǄ-ǌǱ-ǳﬀ-ﬄﬆ\u3000\uff01-\uffef]/g, (letter) => letter.normalize("NFKC")) // ligatures, widths
        .replace(/[\u02bc\u2018-\u201b]/g, "'")
        .replace(/[\u201c-\u201f]/g, '"')
        .replace(/\r\n|[\r\u2028\u2029\x85]/g, "\n")
        .toWellFormed()
        .replace(/\x1b\[[\p{Nd};]*[a-zA-Z]/gu, "")
        .replace(/[\0-\x08\v\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]/g, "")
        .normalize("NFC");
    }
    return line;
  });
  return repaired.join("");
}

/** ftfy decodes only entities that end in a semicolon, and also lower-case names that are written in capitals. */
function unescapeWhole(entity) {
  const decoded = unescape(entity);
  if (entity.startsWith("&#")) return decoded.includes(";") ? entity : decoded;
  if (decoded !== entity) return isWhole(decoded) ? decoded : entity;
  const lower = unescape(entity.toLowerCase());
  const capitals = entity === entity.toUpperCase() && lower !== entity.toLowerCase() && isWhole(lower);
  return capitals ? lower.toUpperCase() : entity;
}

const isWhole = (decoded) => decoded === ";" || !decoded.endsWith(";");

/** Python's html.unescape. */
function unescape(text) {
  return text.replace(/&(#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[^\t\n\f <&#;]{1,32};?)/g, (entity) => {
    if (entity[1] === "#") return fromNumber(Number(entity.slice(2).replace(/^[xX]/, "0x").replace(";", "")));
    entities.innerHTML = entity;
    return entities.textContent;
  });
}

function fromNumber(code) {
  if (code === 0 || code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) return "\ufffd";
  if (code >= 0x80 && code <= 0x9f) return fromWindows(String.fromCharCode(code));
  const control = (code < 0x20 && !(code >= 9 && code <= 13 && code !== 11)) || code === 0x7f;
  const none = (code >= 0xfdd0 && code <= 0xfdef) || (code & 0xfffe) === 0xfffe;
  return control || none ? "" : String.fromCodePoint(code);
}

function fromWindows(letter) {
  return windows1252.decode(Uint8Array.of(letter.charCodeAt(0)));
}

/** GPT-2's letter of each byte: printable bytes stand for themselves. */
function byteLetters() {
  let spare = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte !== 173);
    return String.fromCharCode(printable ? byte : spare++);
  });
}
