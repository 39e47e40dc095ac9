// A canvas to draw a digit on, and the picture that the digits data set would have of it.

const SIDE = 32; // of the bitmap whose 4×4 cells are counted

/** Let people draw on a canvas; `drawn` gets an 8×8 PNG after each stroke, and null when the canvas is cleared. */
export function drawOn(canvas, clear, drawn) {
  const context = canvas.getContext("2d", { willReadFrequently: true });
  Object.assign(context, { lineWidth: canvas.width / 11, lineCap: "round", lineJoin: "round", strokeStyle: "#fff" });
  let last = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const scale = canvas.width / box.width;
    return [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  };
  const draw = (event) => {
    if (!last) return;
    const next = place(event);
    context.beginPath();
    context.moveTo(...last);
    context.lineTo(...next);
    context.stroke();
    last = next;
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    draw(event);
  });
  canvas.addEventListener("pointermove", draw);
  canvas.addEventListener("pointerup", async () => {
    last = null;
    drawn(await toPicture(canvas));
  });
  canvas.addEventListener("pointercancel", () => (last = null));
  clear.addEventListener("click", () => {
    context.clearRect(0, 0, canvas.width, canvas.height);
    drawn(null);
  });
}

/** Fit the ink into 32×32 pixels, and count it in cells of 4×4, as E. Alpaydin and C. Kaynak made the data set. */
async function toPicture(canvas) {
  const [left, top, width, height] = inkBox(canvas);
  const scale = SIDE / Math.max(width, height);
  const bitmap = new OffscreenCanvas(SIDE, SIDE).getContext("2d");
  bitmap.imageSmoothingQuality = "high";
  const [w, h] = [width * scale, height * scale];
  bitmap.drawImage(canvas, left, top, width, height, (SIDE - w) / 2, (SIDE - h) / 2, w, h);
  const ink = bitmap.getImageData(0, 0, SIDE, SIDE).data;
  const small = new ImageData(8, 8);
  small.data.fill(255);
  for (let cell = 0; cell < 64; cell++) {
    let count = 0;
    for (let i = 0; i < 16; i++) {
      const [x, y] = [4 * (cell % 8) + (i % 4), 4 * Math.floor(cell / 8) + Math.floor(i / 4)];
      count += ink[4 * (y * SIDE + x) + 3] > 127;
    }
    small.data.fill(Math.round((count * 255) / 16), 4 * cell, 4 * cell + 3);
  }
  const result = new OffscreenCanvas(8, 8);
  result.getContext("2d").putImageData(small, 0, 0);
  return result.convertToBlob();
}

function inkBox(canvas) {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let [left, top, right, bottom] = [canvas.width, canvas.height, 0, 0];
  for (let y = 0; y < canvas.height; y++) {
    for (let x = 0; x < canvas.width; x++) {
      if (data[4 * (y * canvas.width + x) + 3] < 128) continue;
      [left, right] = [Math.min(left, x), Math.max(right, x + 1)];
      [top, bottom] = [Math.min(top, y), Math.max(bottom, y + 1)];
    }
  }
  return [left, top, right - left, bottom - top];
}
