// Pictures to the input of a model: the pixels of tclip_jax's Preprocess, which are those of Pillow.

const BAND = 256; // rows that are read at once, so that a large photo is not copied whole
const PRECISION = 22; // bits of Pillow's fixed-point weights for 8-bit pixels
const ONE = 2 ** PRECISION;
const HALF = ONE / 2;

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: { support: 2, weight: (x) => bicubic(Math.abs(x)) },
};

/** Return the normalised pixels of a picture, float32 (3, height, width). */
export async function readPicture(blob, settings) {
  return normalize(await preprocess(blob, settings), settings);
}

/** Return the resized and cropped pixels of a picture, uint8 (height, width, 3). Throws if it cannot be decoded. */
export async function preprocess(blob, settings) {
  const picture = await decode(blob);
  try {
    const [height, width] = settings.size;
    const [rows, columns] = resizedShape(picture.height, picture.width, settings);
    if (!(rows > 0 && columns > 0)) throw new Error(`a picture of ${picture.width}×${picture.height} is too thin`);
    const rectangle = settings.resize_mode === "shortest" && height !== width;
    const resized = resize(picture, rows, columns, FILTERS[rectangle ? "bicubic" : settings.interpolation]);
    return crop(resized, rows, columns, height, width);
  } finally {
    picture.close();
  }
}

/** Return (pixels / 255 − mean) / std, float32 (3, height, width). */
export function normalize(pixels, { mean, std }) {
  const size = pixels.length / 3;
  const values = new Float32Array(pixels.length);
  for (let channel = 0; channel < 3; channel++) {
    const [center, scale] = [Math.fround(mean[channel]), Math.fround(std[channel])];
    const table = Float32Array.from({ length: 256 }, (_, v) => Math.fround(Math.fround(v / 255) - center) / scale);
    for (let i = 0; i < size; i++) values[channel * size + i] = table[pixels[3 * i + channel]];
  }
  return values;
}

/**
 * Decode a picture as Pillow does: without colour management and orientation, and with colours below full transparency.
 * `read(top, count)` returns rows as RGBA; `indexed` pictures are resized without mixing colours.
 */
async function decode(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  const kind = sniff(bytes);
  let bitmap;
  try {
    const raw = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
    bitmap = await createImageBitmap(withoutOrientation(bytes, kind), raw);
  } catch {
    throw new Error("this browser cannot read it as a picture");
  }
  const { width, height } = bitmap;
  const { read, close } = (kind.opaque ? null : readTexture(bitmap)) ?? readCanvas(bitmap);
  return { ...kind, width, height, read, close: () => (close(), bitmap.close()) };
}

/** Say how Pillow holds the pixels of a file: whether it is opaque, blends by its alpha channel, or has a palette. */
function sniff(bytes) {
  const text = (start, end) => String.fromCharCode(...bytes.subarray(start, end));
  if (text(0, 2) === "\xff\xd8") return { format: "jpeg", opaque: true };
  if (text(1, 4) === "PNG") {
    const [depth, colour] = bytes.subarray(24, 26); // 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA
    return { format: "png", indexed: colour === 3 || depth === 1, blends: colour >= 4 };
  }
  const indexed = text(0, 3) === "GIF" || (text(0, 2) === "BM" && bytes[28] <= 8);
  return { indexed, blends: !indexed };
}

/** Return the parts of a JPEG or PNG file without Exif data: browsers rotate by it, and training does not. */
function withoutOrientation(bytes, { format }) {
  const view = new DataView(bytes.buffer);
  const parts = [];
  let kept = 0;
  const drop = (start, end) => {
    parts.push(bytes.subarray(kept, start));
    kept = end;
  };
  if (format === "jpeg") {
    for (let at = 2; at + 10 <= bytes.length && bytes[at] === 0xff && bytes[at + 1] !== 0xda; ) {
      const end = at + 2 + view.getUint16(at + 2);
      if (bytes[at + 1] === 0xe1 && view.getUint32(at + 4) === 0x45786966) drop(at, end); // "Exif"
      at = end;
    }
  } else if (format === "png") {
    for (let at = 8; at + 12 <= bytes.length; ) {
      const end = at + 12 + view.getUint32(at);
      if (view.getUint32(at + 4) === 0x65584966) drop(at, end); // "eXIf"
      at = end;
    }
  }
  return new Blob([...parts, bytes.subarray(Math.min(kept, bytes.length))]);
}

/** Read opaque pixels; a canvas loses colours where alpha is low. */
function readCanvas(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, 1);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const read = (top, count) => {
    canvas.height = count; // which clears it
    context.drawImage(bitmap, 0, -top);
    return context.getImageData(0, 0, bitmap.width, count).data;
  };
  return { read, close: () => {} };
}

let gl; // one for all pictures, as browsers allow few

/** Read pixels as they were decoded, from a texture; null where that is not possible. */
function readTexture(bitmap) {
  gl ??= new OffscreenCanvas(1, 1).getContext("webgl");
  const side = Math.max(bitmap.width, bitmap.height);
  if (!gl || gl.isContextLost() || side > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  const texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  const framebuffer = gl.createFramebuffer();
  gl.bindFramebuffer(gl.FRAMEBUFFER, framebuffer);
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  const read = (top, count) => {
    const rows = new Uint8Array(4 * bitmap.width * count);
    gl.readPixels(0, top, bitmap.width, count, gl.RGBA, gl.UNSIGNED_BYTE, rows);
    return rows;
  };
  const close = () => {
    gl.deleteFramebuffer(framebuffer);
    gl.deleteTexture(texture);
  };
  if (gl.checkFramebufferStatus(gl.FRAMEBUFFER) === gl.FRAMEBUFFER_COMPLETE) return { read, close };
  close();
  return null;
}

/** Resize as Pillow 13 does: first rows, or first columns if more of them is left out, with 8 bits between. RGBA. */
function resize(picture, height, width, filter) {
  const taps = picture.indexed ? nearest : weights;
  const [across, down] = [taps(picture.width, width, filter), taps(picture.height, height, filter)];
  const blends = picture.blends && (picture.height !== height || picture.width !== width);
  const columnsFirst = picture.height > height && picture.height - height > 2 * (picture.width - width);
  const resized = new Uint8ClampedArray(4 * height * width);
  const half = new Uint8ClampedArray(4 * (columnsFirst ? height * picture.width : picture.height * width));
  const band = columnsFirst ? picture.height : BAND;
  for (let top = 0; top < picture.height; top += band) {
    const rows = picture.read(top, Math.min(band, picture.height - top));
    if (blends) premultiply(rows);
    if (columnsFirst) mixColumns(rows, picture.width, half, down);
    else mixRows(rows, picture.width, half.subarray(4 * top * width), width, across);
  }
  if (columnsFirst) mixRows(half, picture.width, resized, width, across);
  else mixColumns(half, width, resized, down);
  if (blends) divide(resized);
  return resized;
}

function mixRows(from, width, to, target, taps) {
  for (let y = 0; 4 * y * width < from.length; y++) mix(from, 4 * y * width, 4, to, 4 * y * target, 4, taps);
}

function mixColumns(from, width, to, taps) {
  for (let x = 0; x < width; x++) mix(from, 4 * x, 4 * width, to, 4 * x, 4 * width, taps);
}

/** Mix the pixels of a line of `from`, which start at `source` and are `step` bytes apart, into a line of `to`. */
function mix(from, source, step, to, target, stride, taps) {
  for (const { first, weights } of taps) {
    let [r, g, b, a] = [HALF, HALF, HALF, HALF];
    for (let k = 0, at = source + first * step; k < weights.length; k++, at += step) {
      const weight = weights[k];
      r += from[at] * weight;
      g += from[at + 1] * weight;
      b += from[at + 2] * weight;
      a += from[at + 3] * weight;
    }
    to[target] = r >> PRECISION;
    to[target + 1] = g >> PRECISION;
    to[target + 2] = b >> PRECISION;
    to[target + 3] = a >> PRECISION;
    target += stride;
  }
}

/** Return the input pixels of each output pixel with their weights, in fixed point. */
function weights(length, target, { support, weight }) {
  if (length === target) return nearest(length, target);
  const scale = length / target;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: target }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support * stretch + 0.5), 0);
    const end = Math.min(Math.trunc(center + support * stretch + 0.5), length);
    const values = Float64Array.from({ length: end - first }, (_, k) => weight((k + first - center + 0.5) / stretch));
    const total = values.reduce((sum, value) => sum + value, 0);
    return { first, weights: Int32Array.from(values, (v) => Math.trunc((v / total) * ONE + (v < 0 ? -0.5 : 0.5))) };
  });
}

function nearest(length, target) {
  let at = length / target / 2;
  return Array.from({ length: target }, () => {
    const first = Math.trunc(at);
    at += length / target; // summed, as in Pillow
    return { first, weights: Int32Array.of(ONE) };
  });
}

function bicubic(x) {
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0;
}

function premultiply(rows) {
  for (let i = 0; i < rows.length; i += 4) {
    for (let c = i; c < i + 3; c++) {
      const product = rows[c] * rows[i + 3] + 128;
      rows[c] = ((product >> 8) + product) >> 8;
    }
  }
}

function divide(rows) {
  for (let i = 0; i < rows.length; i += 4) {
    const alpha = rows[i + 3];
    if (alpha === 0 || alpha === 255) continue;
    for (let c = i; c < i + 3; c++) rows[c] = Math.min(255, Math.trunc((255 * rows[c]) / alpha));
  }
}

/** Cut out the centre of RGBA rows as RGB; what is outside is black. */
function crop(rows, rowCount, columnCount, height, width) {
  const [top, left] = [cropStart(rowCount, height), cropStart(columnCount, width)];
  const pixels = new Uint8Array(3 * height * width);
  for (let y = Math.max(0, -top); y < Math.min(height, rowCount - top); y++) {
    for (let x = Math.max(0, -left); x < Math.min(width, columnCount - left); x++) {
      const at = 4 * ((y + top) * columnCount + x + left);
      pixels.set(rows.subarray(at, at + 3), 3 * (y * width + x));
    }
  }
  return pixels;
}

/** Return the size before the crop, rounded as torchvision (square sizes) and timm do. */
function resizedShape(height, width, { size, resize_mode: mode }) {
  if (mode === "squash") return size;
  if (mode === "shortest" && size[0] === size[1]) {
    const short = size[0];
    return height <= width
      ? [short, Math.trunc((short * width) / height)]
      : [Math.trunc((short * height) / width), short];
  }
  const ratios = [height / size[0], width / size[1]];
  const ratio = mode === "shortest" ? Math.min(...ratios) : Math.max(...ratios);
  return [roundEven(height / ratio), roundEven(width / ratio)];
}

function cropStart(length, target) {
  return length >= target ? roundEven((length - target) / 2) : -Math.floor((target - length) / 2);
}

/** Python's round. */
function roundEven(value) {
  const floor = Math.floor(value);
  return value - floor === 0.5 ? floor + (floor % 2) : Math.round(value);
}
