// Zooming and moving a picture within a stage, by wheel, pinch, drag and double click; a swipe of one that is not zoomed
// is reported instead.

const MOST = 8;
const SWIPE = 60;   // pixels

export function createZoom(stage, { swiped, zoomed }) {
  let image = null, scale = 1, x = 0, y = 0;
  const fingers = new Map();
  let start = null;

  function paint() {
    if (!image) return;
    const roomX = Math.max(0, (image.clientWidth * scale - stage.clientWidth) / 2);
    const roomY = Math.max(0, (image.clientHeight * scale - stage.clientHeight) / 2);
    x = Math.min(Math.max(x, -roomX), roomX);
    y = Math.min(Math.max(y, -roomY), roomY);
    image.style.transform = scale === 1 ? "" : `translate(${x}px, ${y}px) scale(${scale})`;
    stage.classList.toggle("zoomed", scale > 1);
  }

  // Zooms by a factor, so that what is at a place of the stage stays there; by default its middle.
  function by(factor, clientX, clientY) {
    const { left, top, width, height } = stage.getBoundingClientRect();
    const fromX = (clientX ?? left + width / 2) - left - width / 2, fromY = (clientY ?? top + height / 2) - top - height / 2;
    const next = Math.min(Math.max(scale * factor, 1), MOST);
    x = fromX - (fromX - x) * (next / scale);
    y = fromY - (fromY - y) * (next / scale);
    scale = next;
    paint();
    if (scale > 1) zoomed(image);
  }

  const spread = () => {
    const [a, b] = [...fingers.values()];
    return { apart: Math.hypot(a.x - b.x, a.y - b.y), x: (a.x + b.x) / 2, y: (a.y + b.y) / 2 };
  };

  stage.addEventListener("wheel", event => {
    if (!image) return;
    event.preventDefault();
    by(Math.exp(-event.deltaY / (event.ctrlKey ? 100 : 400)), event.clientX, event.clientY);
  }, { passive: false });
  stage.addEventListener("dblclick", event => {
    if (document.elementFromPoint(event.clientX, event.clientY) === image) by(scale > 1 ? 1 / MOST : 2.5, event.clientX, event.clientY);
  });
  stage.addEventListener("pointerdown", event => {
    if (event.button || event.target.closest("button")) return;
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    stage.setPointerCapture(event.pointerId);
    start = { x: event.clientX, y: event.clientY, atX: x, atY: y, many: fingers.size > 1 };
    if (fingers.size === 2) Object.assign(start, spread(), { scale });
  });
  stage.addEventListener("pointermove", event => {
    if (!fingers.has(event.pointerId) || !start) return;
    fingers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (fingers.size === 2) {
      const now = spread();
      by((start.scale * now.apart) / start.apart / scale, now.x, now.y);
    } else if (scale > 1 && !start.many) {
      x = start.atX + event.clientX - start.x;
      y = start.atY + event.clientY - start.y;
      paint();
    }
  });
  const up = event => {
    if (!fingers.delete(event.pointerId) || fingers.size || !start) return;
    const across = event.clientX - start.x, down = event.clientY - start.y;
    if (event.type === "pointerup" && scale === 1 && !start.many && event.pointerType !== "mouse") {
      if (Math.abs(across) > SWIPE && Math.abs(across) > 1.5 * Math.abs(down)) swiped(across < 0 ? "next" : "previous");
      else if (down > 1.5 * SWIPE && down > 1.5 * Math.abs(across)) swiped("close");
    }
    start = null;
  };
  stage.addEventListener("pointerup", up);
  stage.addEventListener("pointercancel", up);

  return {
    by,
    on(next) {
      image = next;
      scale = 1;
      x = y = 0;
      paint();
    },
  };
}
