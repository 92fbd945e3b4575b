// Curves zoom (drag across one, all follow; double click or Escape: all of it), and the map shows what a point is.
const plots = [...document.querySelectorAll('svg[data-x]')];
const W = 560, H = 200, LEFT = 80, BELOW = 32, WIDE = W - LEFT - 8, HIGH = H - BELOW - 10;
const short = value => String(Number(value.toPrecision(3)));
const numbers = line => line.dataset.p.split(' ').map(pair => pair.split(',').map(Number));
const whole = plots.flatMap(plot => [...plot.querySelectorAll('polyline')].flatMap(numbers)).map(point => point[0]);
const all = [Math.min(...whole), Math.max(...whole)];
let range = all;

function draw(plot) {
  const lines = [...plot.querySelectorAll('polyline')];
  const own = lines.flatMap(numbers).map(point => point[0]);
  const [left, right] = range === all ? [Math.min(...own), Math.max(...own)] : range;
  const level = plot.querySelector('.level');
  const inside = lines.flatMap(numbers).filter(([x]) => x >= left && x <= right).map(point => point[1]);
  if (range === all && level) inside.push(Number(level.dataset.y));
  if (!inside.length) return;
  let low = Math.min(...inside), top = Math.max(...inside);
  if (range === all && 'low' in plot.dataset) low = Math.min(low, 0);
  if (top <= low) top = low + 1;
  const x = value => LEFT + (value - left) / (right - left || 1) * WIDE;
  const y = value => H - BELOW - (value - low) / (top - low) * HIGH;
  for (const line of lines)
    line.setAttribute('points', numbers(line).filter(([a]) => a >= left && a <= right).map(([a, b]) => `${x(a)},${y(b)}`).join(' '));
  if (level) {
    const at = y(Number(level.dataset.y));
    level.setAttribute('d', `M${LEFT} ${at}H${W - 6}`);
    level.style.display = at < 0 || at > H - BELOW ? 'none' : '';
  }
  for (const [name, value] of [['top', short(top)], ['bottom', short(low)], ['left', Math.round(left)], ['right', Math.round(right)]])
    plot.querySelector('.' + name).textContent = value;
  plot.dataset.range = `${left} ${right}`;
}

function zoom(to) { range = to; plots.forEach(draw); }

for (const plot of plots) {
  let from = null, pick = null;
  const place = event => {
    const box = plot.getBoundingClientRect();
    return Math.max(LEFT, Math.min(W - 8, (event.clientX - box.left) / box.width * W));
  };
  plot.addEventListener('pointerdown', event => {
    from = place(event);
    pick = plot.appendChild(document.createElementNS(plot.namespaceURI, 'rect'));
    pick.setAttribute('class', 'pick'); pick.setAttribute('y', 8); pick.setAttribute('height', H - BELOW - 8);
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener('pointermove', event => {
    if (from === null) return;
    const to = place(event);
    pick.setAttribute('x', Math.min(from, to)); pick.setAttribute('width', Math.abs(to - from));
  });
  const end = event => {
    if (from === null) return;
    const [a, b] = [from, place(event)].sort((one, other) => one - other);
    pick.remove(); from = null;
    if (event.type !== 'pointerup' || b - a < 8) return;
    const own = (plot.dataset.range || '').split(' ').map(Number);
    const xs = [...plot.querySelectorAll('polyline')].flatMap(numbers).map(point => point[0]);
    const [left, right] = own.length === 2 ? own : [Math.min(...xs), Math.max(...xs)];
    const value = at => left + (at - LEFT) / WIDE * (right - left);
    zoom([value(a), value(b)]);
  };
  plot.addEventListener('pointerup', end);
  plot.addEventListener('pointercancel', end);
  plot.addEventListener('dblclick', () => zoom(all));
}
document.addEventListener('keydown', event => { if (event.key === 'Escape') zoom(all); });

for (const map of document.querySelectorAll('.map')) {
  const held = map.parentElement.querySelector('.held');
  const show = event => {
    const point = event.target.closest('circle');
    if (!point) return;
    map.querySelectorAll('.on').forEach(other => other.classList.remove('on'));
    point.classList.add('on');
    held.innerHTML = '';
    const picture = document.createElement('i');
    picture.className = 'p p' + point.dataset.i;
    const words = document.createElement('span');
    words.textContent = point.querySelector('title').textContent;
    held.append(picture, words);
  };
  for (const kind of ['pointerover', 'focusin', 'click']) map.addEventListener(kind, show);
}
