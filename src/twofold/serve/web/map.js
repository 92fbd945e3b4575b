// The collection as a plane: points from afar, pictures from near; drag, zoom, and choose with a lasso.

const MOST = 400; // pictures at once

export class Map2D {
  /**
   * `layout`: ids with x and y, each in 0..1. `ask.picture(id)` is the address of a small picture, or null; `onopen(id)`,
   * `onchoose(ids or null)` and `onlasso(on)` say what was done.
   */
  constructor(canvas, layout, ask) {
    Object.assign(this, { canvas, layout, ask, lit: new Set(), chosen: null, lasso: null, drawing: false, pictures: new Map() });
    this.view = { x: 0.5, y: 0.5, zoom: 1 };
    this.pen = canvas.getContext("2d");
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.onwheel = (event) => { event.preventDefault(); this.zoom(Math.exp(-event.deltaY / 400), event.offsetX, event.offsetY); };
    canvas.onpointerdown = (event) => this.press(event);
    canvas.onpointermove = (event) => this.move(event);
    canvas.onpointerup = (event) => this.release(event);
    canvas.onpointercancel = () => { this.fingers.clear(); };
    canvas.onkeydown = (event) => this.key(event);
    this.fingers = new Map();
  }

  light(ids) { this.lit = ids; this.draw(); }

  /** Choose these items, or none; `quiet` tells nobody. */
  choose(ids, { quiet = false } = {}) {
    this.chosen = ids;
    if (!quiet) this.ask.onchoose(ids);
    this.draw();
  }

  /** Whether dragging draws a lasso, without Shift. */
  draws(on) {
    this.drawing = on;
    this.canvas.classList.toggle("draws", on);
    this.ask.onlasso(on);
  }

  zoomBy(factor) { this.zoom(factor, this.canvas.clientWidth / 2, this.canvas.clientHeight / 2); }

  whole() {
    this.view = { x: 0.5, y: 0.5, zoom: 1 };
    this.draw();
  }

  get scale() { return 0.92 * Math.min(this.canvas.clientWidth, this.canvas.clientHeight) * this.view.zoom; }

  place(index) {
    const { x, y } = this.view;
    return [this.canvas.clientWidth / 2 + (this.layout.x[index] - x) * this.scale,
            this.canvas.clientHeight / 2 + (this.layout.y[index] - y) * this.scale];
  }

  zoom(factor, px, py) {
    const before = this.scale;
    this.view.zoom = Math.min(400, Math.max(0.5, this.view.zoom * factor));
    const keep = (1 / before - 1 / this.scale); // the point under the pointer stays there
    this.view.x += (px - this.canvas.clientWidth / 2) * keep;
    this.view.y += (py - this.canvas.clientHeight / 2) * keep;
    this.draw();
  }

  press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
    this.moved = 0;
    this.lasso = event.shiftKey || this.drawing ? [[event.offsetX, event.offsetY]] : null;
  }

  move(event) {
    const was = this.fingers.get(event.pointerId);
    if (!was) return;
    const now = [event.offsetX, event.offsetY];
    this.moved += Math.hypot(now[0] - was[0], now[1] - was[1]);
    if (this.lasso) this.lasso.push(now);
    else if (this.fingers.size === 2) {
      const other = [...this.fingers].find(([id]) => id !== event.pointerId)[1];
      const [a, b] = [was, now].map((p) => Math.hypot(p[0] - other[0], p[1] - other[1]));
      if (a > 0) this.zoom(b / a, (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else {
      this.view.x -= (now[0] - was[0]) / this.scale;
      this.view.y -= (now[1] - was[1]) / this.scale;
    }
    this.fingers.set(event.pointerId, now);
    this.draw();
  }

  release(event) {
    this.fingers.delete(event.pointerId);
    if (this.lasso && this.lasso.length > 2) {
      const inside = new Set(this.layout.ids.filter((_, index) => within(this.place(index), this.lasso)));
      this.draws(false);
      this.choose(inside.size ? inside : null);
    } else if (this.moved < 5) {
      const [index, far] = this.nearest(event.offsetX, event.offsetY);
      if (far < 24) this.ask.onopen(this.layout.ids[index]);
    }
    this.lasso = null;
    this.draw();
  }

  key(event) {
    const step = 40 / this.scale;
    const act = { "+": () => this.zoomBy(1.3), "-": () => this.zoomBy(1 / 1.3), 0: () => this.whole(),
      Escape: () => (this.drawing ? this.draws(false) : this.choose(null)),
      ArrowLeft: () => { this.view.x -= step; }, ArrowRight: () => { this.view.x += step; },
      ArrowUp: () => { this.view.y -= step; }, ArrowDown: () => { this.view.y += step; } }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
    this.draw();
  }

  nearest(px, py) {
    let best = [-1, Infinity];
    for (let index = 0; index < this.layout.ids.length; index++) {
      const [x, y] = this.place(index);
      const far = Math.hypot(x - px, y - py);
      if (far < best[1]) best = [index, far];
    }
    return best;
  }

  draw() {
    this.due ??= requestAnimationFrame(() => { this.due = null; this.paint(); });
  }

  paint() {
    const { canvas, pen, layout } = this;
    const ratio = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (canvas.width !== width * ratio || canvas.height !== height * ratio) {
      [canvas.width, canvas.height] = [width * ratio, height * ratio];
    }
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    const style = getComputedStyle(canvas);
    const ink = style.getPropertyValue("color");
    const accent = style.getPropertyValue("accent-color");
    const seen = [];
    for (let index = 0; index < layout.ids.length; index++) {
      const [x, y] = this.place(index);
      if (x > -30 && y > -30 && x < width + 30 && y < height + 30) seen.push([index, x, y]);
    }
    const shade = (id) => (this.chosen && !this.chosen.has(id) ? 0.15 : this.lit.size && !this.lit.has(id) ? 0.5 : 1);
    for (const [index, x, y] of seen) {
      const id = layout.ids[index];
      pen.globalAlpha = shade(id);
      pen.fillStyle = this.lit.has(id) ? accent : ink;
      pen.fillRect(x - 1.5, y - 1.5, 3, 3);
    }
    // One picture a cell, what was found before the rest, and above it.
    const taken = new Set();
    const drawn = [];
    for (const [index, x, y] of seen.sort((a, b) => this.lit.has(layout.ids[b[0]]) - this.lit.has(layout.ids[a[0]]))) {
      const id = layout.ids[index];
      const cell = `${Math.floor(x / 40)} ${Math.floor(y / 40)}`;
      if (taken.size === MOST || taken.has(cell) || shade(id) < 0.2) continue;
      taken.add(cell);
      const image = this.picture(id);
      if (image) drawn.push([id, x, y, image]);
    }
    for (const [id, x, y, image] of drawn.reverse()) {
      const side = 32 / Math.max(image.width, image.height);
      const [width, height] = [image.width * side, image.height * side];
      pen.clearRect(x - width / 2, y - height / 2, width, height); // no points to be seen through a pale one
      pen.globalAlpha = shade(id);
      pen.drawImage(image, x - width / 2, y - height / 2, width, height);
      if (this.lit.has(id)) {
        pen.strokeStyle = accent;
        pen.lineWidth = 2;
        pen.strokeRect(x - 17, y - 17, 34, 34);
      }
    }
    pen.globalAlpha = 1;
    if (this.lasso) {
      pen.strokeStyle = accent;
      pen.lineWidth = 1.5;
      pen.beginPath();
      this.lasso.forEach(([x, y], at) => (at ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      pen.closePath();
      pen.stroke();
    }
  }

  picture(id) {
    let image = this.pictures.get(id);
    if (image === undefined) {
      const address = this.ask.picture(id);
      if (!address) { // words stay points
        this.pictures.set(id, null);
        return null;
      }
      image = new Image();
      image.onload = () => { image.there = true; this.draw(); };
      image.src = address;
      this.pictures.set(id, image);
    }
    return image?.there ? image : null;
  }
}

/** Whether a point lies inside a polygon (even–odd rule). */
export function within([x, y], polygon) {
  let inside = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [[xi, yi], [xj, yj]] = [polygon[i], polygon[j]];
    if (yi > y !== yj > y && x < ((xj - xi) * (y - yi)) / (yj - yi) + xi) inside = !inside;
  }
  return inside;
}
