"use strict";

/* The theme: as the system has it until the button is pressed. */
(() => {
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
  const show = () => {
    button.setAttribute("aria-pressed", String(isDark()));
    document.dispatchEvent(new CustomEvent("themechange"));
  };
  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  system.addEventListener("change", show);
  button.hidden = false;
  show();
})();

/* The flow: points on their way from the base to the data. */
(() => {
  const source = document.getElementById("motion-data");
  if (!source) return;
  const motion = JSON.parse(source.textContent);
  const last = motion.names.length - 1;
  const width = motion.columns.length;
  const count = motion.count;

  const element = (id) => document.getElementById(id);
  const canvas = element("motion");
  const slider = element("motion-slider");
  const play = element("motion-play");
  const across = element("motion-x");
  const upward = element("motion-y");
  const rows = element("motion-rows");
  const now = element("motion-now");
  const low = element("ramp-low");
  const high = element("ramp-high");

  const numbers = (text) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Int16Array.from({ length: bytes.length / 2 }, (_, i) => view.getInt16(2 * i, true));
  };
  /* Positions in the window of their step: 0 at its lower edge and 1 at its upper one. */
  const SCALE = motion.scale;
  const points = numbers(motion.points);
  const heights = numbers(motion.heights);
  const data = numbers(motion.data);

  const state = { at: 0, playing: false, started: 0, from: 0 };

  /* Points rest at each step for a moment: the way between two is eased. */
  const eased = (f) => f * f * (3 - 2 * f);
  const between = (array, step, offset, stride) => {
    const k = Math.min(Math.floor(step), last);
    const here = array[k * stride + offset];
    if (k === last) return here;
    const next = array[(k + 1) * stride + offset];
    return here + eased(step - k) * (next - here);
  };

  const style = () => getComputedStyle(document.documentElement);
  const channels = (colour) => {
    const hex = colour.trim().slice(1);
    return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
  };
  const SHADES = 24;
  let shades = [];
  let ink = {};
  const readColours = () => {
    const css = style();
    const stops = [0, 1, 2, 3].map((i) => channels(css.getPropertyValue(`--ramp-${i}`)));
    shades = Array.from({ length: SHADES }, (_, i) => {
      const t = (3 * i) / (SHADES - 1);
      const k = Math.min(Math.floor(t), 2);
      const mixed = stops[k].map((c, j) => Math.round(c + (t - k) * (stops[k + 1][j] - c)));
      return `rgb(${mixed.join(",")})`;
    });
    ink = {
      text: css.getPropertyValue("--ink").trim(),
      soft: css.getPropertyValue("--soft").trim(),
      rule: css.getPropertyValue("--rule").trim(),
      data: css.getPropertyValue("--data").trim(),
      font: getComputedStyle(document.body).fontFamily,
    };
  };

  /* Room for the widest tick that the upward column has at any step, so that nothing jumps. */
  const widest = (pen, j) => {
    pen.font = `12px ${ink.font}`;
    return Math.max(...motion.ticks.flatMap((step) => step[j].map(([, t]) => pen.measureText(t).width)), 20);
  };
  const box = (pen, j) => ({
    left: Math.round(widest(pen, j)) + 14,
    top: 12,
    right: canvas.clientWidth - 12,
    bottom: canvas.clientHeight - 40,
  });

  const drawAxes = (pen, area, i, j) => {
    const nearest = Math.round(state.at);
    pen.font = `12px ${ink.font}`;
    pen.lineWidth = 1;
    pen.strokeStyle = ink.rule;
    pen.fillStyle = ink.soft;
    pen.beginPath();
    pen.moveTo(area.left, area.top);
    pen.lineTo(area.left, area.bottom);
    pen.lineTo(area.right, area.bottom);
    pen.stroke();
    pen.textAlign = "center";
    let free = -Infinity;
    for (const [share, text] of motion.ticks[nearest][i]) {
      const x = area.left + share * (area.right - area.left);
      const half = pen.measureText(text).width / 2;
      if (x - half < free) continue;
      free = x + half + 6;
      pen.fillText(text, x, area.bottom + 16);
    }
    pen.textAlign = "right";
    for (const [share, text] of motion.ticks[nearest][j]) {
      pen.fillText(text, area.left - 6, area.bottom - share * (area.bottom - area.top) + 4);
    }
    pen.fillStyle = ink.text;
    pen.textAlign = "center";
    pen.fillText(short(motion.columns[i], 40), (area.left + area.right) / 2, area.bottom + 34);
    pen.textAlign = "left";
    pen.fillText(`↑ ${short(motion.columns[j], 34)}`, area.left + 6, area.top + 10);
  };
  const short = (text, most) => (text.length > most ? `${text.slice(0, most - 1)}…` : text);

  const drawData = (pen, area, i, j) => {
    const size = data.length / width;
    const fade = Math.max(0, 1 - Math.abs(last - state.at));
    if (!rows.checked || fade === 0) return;
    pen.globalAlpha = 0.55 * fade;
    pen.fillStyle = ink.data;
    for (let n = 0; n < size; n++) {
      const x = area.left + (data[i * size + n] / SCALE) * (area.right - area.left);
      const y = area.bottom - (data[j * size + n] / SCALE) * (area.bottom - area.top);
      pen.fillRect(x - 1.25, y - 1.25, 2.5, 2.5);
    }
    pen.globalAlpha = 1;
  };

  const drawPoints = (pen, area, i, j) => {
    const stride = width * count;
    const groups = Array.from({ length: SHADES }, () => []);
    for (let n = 0; n < count; n++) {
      const height = between(heights, state.at, n, count) / SCALE;
      const shade = Math.round(Math.min(Math.max(height, 0), 1) * (SHADES - 1));
      const x = between(points, state.at, i * count + n, stride) / SCALE;
      const y = between(points, state.at, j * count + n, stride) / SCALE;
      groups[shade].push(
        area.left + x * (area.right - area.left),
        area.bottom - y * (area.bottom - area.top),
      );
    }
    const radius = Math.min(Math.max(70 / Math.sqrt(count), 1.5), 3.2);
    groups.forEach((group, shade) => {
      pen.fillStyle = shades[shade];
      pen.beginPath();
      for (let n = 0; n < group.length; n += 2) {
        pen.moveTo(group[n] + radius, group[n + 1]);
        pen.arc(group[n], group[n + 1], radius, 0, 2 * Math.PI);
      }
      pen.fill();
    });
  };

  const draw = () => {
    const ratio = window.devicePixelRatio || 1;
    const wide = Math.round(canvas.clientWidth * ratio);
    const tall = Math.round(canvas.clientHeight * ratio);
    if (canvas.width !== wide || canvas.height !== tall) {
      canvas.width = wide;
      canvas.height = tall;
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    const [i, j] = [Number(across.value), Number(upward.value)];
    const area = box(pen, j);
    drawAxes(pen, area, i, j);
    pen.save();
    pen.beginPath();
    pen.rect(area.left, area.top - 6, area.right - area.left + 8, area.bottom - area.top + 6);
    pen.clip();
    drawData(pen, area, i, j);
    drawPoints(pen, area, i, j);
    pen.restore();
  };

  /* What is said in words changes only where a step is reached, so that nobody hears every frame. */
  let told = -1;
  const tell = () => {
    const nearest = Math.round(state.at);
    const key = nearest * width * width + Number(across.value) * width + Number(upward.value);
    slider.setAttribute("aria-valuetext", `step ${state.at.toFixed(1)} of ${last}`);
    if (key === told) return;
    told = key;
    low.textContent = motion.ramp[nearest][0];
    high.textContent = motion.ramp[nearest][1];
    const [head, rest] = motion.texts[nearest];
    const strong = document.createElement("strong");
    strong.textContent = head;
    now.replaceChildren(strong, document.createElement("br"), rest);
    const names = [across, upward].map((list) => motion.columns[Number(list.value)]);
    canvas.setAttribute(
      "aria-label",
      `${count} points at step ${nearest} of ${last}, ${names[0]} across and ${names[1]} upward. ` +
        `${head} ${rest}`,
    );
  };

  const move = (to) => {
    state.at = Math.min(Math.max(to, 0), last);
    slider.value = String(state.at);
    draw();
    tell();
  };

  const stop = () => {
    state.playing = false;
    play.textContent = "Play";
    now.setAttribute("aria-live", "polite");
  };
  const SECONDS = Math.max(0.9, 6 / Math.max(last, 1));
  const frame = (time) => {
    if (!state.playing) return;
    const to = state.from + (time - state.started) / 1000 / SECONDS;
    move(to);
    if (to >= last) stop();
    else requestAnimationFrame(frame);
  };
  play.addEventListener("click", () => {
    if (state.playing) return stop();
    state.playing = true;
    state.from = state.at >= last ? 0 : state.at;
    state.started = performance.now();
    play.textContent = "Pause";
    now.setAttribute("aria-live", "off");
    requestAnimationFrame(frame);
  });

  slider.addEventListener("input", () => {
    stop();
    move(Number(slider.value));
  });
  /* A key goes a tenth of a step, or with Page up and down a whole one. */
  slider.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -0.1, ArrowDown: -0.1, ArrowRight: 0.1, ArrowUp: 0.1 }[event.key];
    const whole = { PageDown: -1, PageUp: 1 }[event.key];
    if (by === undefined && whole === undefined) return;
    event.preventDefault();
    stop();
    move(by === undefined ? Math.round(state.at) + whole : Math.round(10 * (state.at + by)) / 10);
  });
  element("motion-back").addEventListener("click", () => {
    stop();
    move(Math.ceil(state.at) - 1);
  });
  element("motion-on").addEventListener("click", () => {
    stop();
    move(Math.floor(state.at) + 1);
  });
  /* The same column twice would be a line: then the other list takes the column that was left. */
  const chosen = { x: across.value, y: upward.value };
  const choose = () => {
    if (across.value === upward.value) {
      if (across.value !== chosen.x) upward.value = chosen.x;
      else across.value = chosen.y;
    }
    [chosen.x, chosen.y] = [across.value, upward.value];
    draw();
    tell();
  };
  across.addEventListener("change", choose);
  upward.addEventListener("change", choose);
  rows.addEventListener("change", draw);

  const refresh = () => {
    readColours();
    draw();
  };
  document.addEventListener("themechange", refresh);
  new ResizeObserver(draw).observe(canvas);
  element("motion-controls").hidden = false;
  readColours();
  move(Number(slider.value));
  canvas.dataset.ready = "yes";
})();
