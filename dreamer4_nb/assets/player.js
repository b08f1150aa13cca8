// Plays a dreamed world beside its simulator: on the page of `dreamer4-nb play`, and as a widget in a notebook.
//
// `play` gets a channel {send(message), onmessage(answer, pictures)}. One message is under way at a time, and each
// answer allows the next. A player that is paused, hidden or closed sends nothing, so nothing is computed for it.

const VIEW = `
<div class="d4-board">
<div class="d4-column">
  <div class="d4-stage">
    <figure>
      <canvas data-part="dream" width="64" height="64" role="img" aria-label="The dreamed frame"></canvas>
      <figcaption><b>Dream</b> <span data-part="since"></span></figcaption>
    </figure>
    <figure data-part="truth">
      <canvas data-part="simulator" width="64" height="64" role="img" aria-label="The simulator's frame"></canvas>
      <figcaption><b>Simulator</b> under the same actions</figcaption>
    </figure>
  </div>
  <p class="d4-status" data-part="status" role="status">Loading the world …</p>
  <div class="d4-numbers">
    <label title="How much the dreams side by side disagree">uncertainty
      <meter data-part="disagreement" min="0" max="1" low="0.5" high="0.8" optimum="0"></meter></label>
    <span><b data-part="rate">–</b> frames a second</span>
    <label><input type="checkbox" data-part="free"> as fast as it can</label>
  </div>
  <div class="d4-plot">
    <div data-part="legend"></div>
    <canvas data-part="plot" role="img" aria-label="Rewards and value of the last ten seconds"></canvas>
  </div>
</div>
<div class="d4-column">
  <div class="d4-steer" data-part="steer"></div>
  <div class="d4-main">
    <button data-part="pause" aria-keyshortcuts="Space">Play</button>
    <button data-part="return" aria-keyshortcuts="B"
      title="The dream begins again from the simulator's last true frames">Back to reality</button>
    <div class="d4-actors" data-part="actors" role="group" aria-label="Who acts"></div>
  </div>
  <div class="d4-settings">
    <div>
      <select data-part="from" aria-label="Begin from">
        <option value="demonstration">demonstration</option>
        <option value="simulator">simulator, seed</option>
      </select>
      <input data-part="number" type="number" min="0" step="1" placeholder="random"
        aria-label="Which one; empty: a random one">
      <button data-part="reset" aria-keyshortcuts="R">Reset</button>
    </div>
    <div>
      <label title="Steps in which a dreamed frame is made">steps K <select data-part="steps"></select></label>
      <label title="Dreams side by side, whose disagreement is the uncertainty; 1 turns it off">futures
        <select data-part="futures"></select></label>
    </div>
    <div>
      <label title="How much of the past frames the dream is shown; the rest is noise">context signal
        <input data-part="context" type="range" min="0" step="1">
        <output data-part="contextShown"></output></label>
    </div>
    <div>
      <button data-part="film">Save film</button>
      <button data-part="episode">Save episode</button>
    </div>
    <details><summary>Keys</summary><dl>
      <dt data-part="steeringKeys">arrows</dt><dd>steer</dd>
      <dt>space</dt><dd>pause, play</dd>
      <dt>H</dt><dd>hand over, take back</dd>
      <dt>B</dt><dd>back to reality</dd>
      <dt>R</dt><dd>reset</dd>
    </dl></details>
  </div>
</div>
</div>`;

const CURVES = { reward: "true reward", predicted: "predicted reward", value: "value" };
const SHOWN = 250; // decisions in the plot
const RAMP = 1 / 3; // a key reaches full deflection in three decisions
const ARROWS = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [1, 1], ArrowDown: [1, -1] };

const OPTIONS = "1234567890qwetyuiopasdfgjkl"; // a key for each option; H, B and R have other uses

const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const text = (x, digits = 2) => (x === null || x === undefined ? "–" : x.toFixed(digits));

function paint(canvas, rgb) {
  const side = Math.sqrt(rgb.length / 3);
  if (canvas.width !== side) canvas.width = canvas.height = side;
  const image = new ImageData(side, side);
  for (let from = 0, to = 0; from < rgb.length; to += 4) {
    image.data[to] = rgb[from++];
    image.data[to + 1] = rgb[from++];
    image.data[to + 2] = rgb[from++];
    image.data[to + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Two strips: rewards above, the value below. A gray line stands where the dream began from true frames.
function makePlot(canvas, legend) {
  const numbers = {};
  for (const [name, title] of Object.entries(CURVES)) {
    const entry = document.createElement("span");
    entry.className = `d4-${name}`;
    entry.append(`${title} `, (numbers[name] = document.createElement("b")));
    legend.append(entry);
  }
  let rows = [];
  let size = [0, 0];

  function curve(context, name, top, height, highest) {
    context.strokeStyle = getComputedStyle(legend.querySelector(`.d4-${name}`)).getPropertyValue("--line");
    context.beginPath();
    let down = false;
    rows.forEach((row, i) => {
      if (row[name] === null || row[name] === undefined) return (down = false);
      const x = ((i + SHOWN - rows.length) / (SHOWN - 1)) * size[0];
      const y = top + height * (1 - clamp(row[name] / highest, 0, 1));
      if (down) context.lineTo(x, y);
      else context.moveTo(x, y);
      down = true;
    });
    context.stroke();
  }

  function draw() {
    const context = canvas.getContext("2d");
    const [width, height] = size;
    const half = height / 2;
    const largest = (...names) => Math.max(...rows.flatMap((row) => names.map((name) => row[name] ?? 0)));
    context.setTransform(canvas.width / width, 0, 0, canvas.height / height, 0, 0);
    context.clearRect(0, 0, width, height);
    context.lineWidth = 1;
    context.strokeStyle = "#8886";
    context.beginPath();
    for (const y of [half - 3, height - 1]) {
      context.moveTo(0, y);
      context.lineTo(width, y);
    }
    rows.forEach((row, i) => {
      const x = ((i + SHOWN - rows.length) / (SHOWN - 1)) * width;
      if (row.since !== 0) return;
      context.moveTo(x, 0);
      context.lineTo(x, height);
    });
    context.stroke();
    context.lineWidth = 4; // it stays visible below the prediction
    curve(context, "reward", 4, half - 8, Math.max(1, largest("reward", "predicted")));
    context.lineWidth = 1.6;
    curve(context, "predicted", 4, half - 8, Math.max(1, largest("reward", "predicted")));
    curve(context, "value", half + 4, half - 6, Math.max(1, largest("value")));
  }

  new ResizeObserver(() => {
    size = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = size[0] * devicePixelRatio;
    canvas.height = size[1] * devicePixelRatio;
    draw();
  }).observe(canvas);

  return {
    clear() {
      rows = [];
    },
    add(row) {
      rows = [...rows.slice(1 - SHOWN), row];
      if (row.t % 3) return; // eight times a second is enough to read
      for (const name in numbers) numbers[name].textContent = text(row[name]);
      draw();
    },
  };
}

// A pad for two action dimensions, else a slider for each. `rest` is what the hand holds, apart from keys.
function makeSteering(holder, dims, begin) {
  const rest = Array(dims).fill(0);
  const action = Array(dims).fill(0);
  const keys = new Set();
  let dragged = false;
  holder.replaceChildren();

  function release() {
    dragged = false;
    rest.fill(0);
  }

  function makePad() {
    const pad = document.createElement("div");
    const knob = document.createElement("i");
    pad.className = "d4-pad";
    pad.dataset.part = "pad";
    pad.setAttribute("role", "img");
    pad.setAttribute("aria-label", "Steering pad: drag in it, or use the arrow keys");
    pad.append(knob);
    holder.append(pad);
    const follow = (event) => {
      const box = pad.getBoundingClientRect();
      rest[0] = clamp((2 * (event.clientX - box.left)) / box.width - 1, -1, 1);
      rest[1] = clamp(1 - (2 * (event.clientY - box.top)) / box.height, -1, 1);
    };
    pad.addEventListener("pointerdown", (event) => {
      pad.setPointerCapture(event.pointerId);
      dragged = true;
      follow(event);
      begin();
    });
    pad.addEventListener("pointermove", (event) => dragged && follow(event));
    pad.addEventListener("pointerup", release);
    pad.addEventListener("pointercancel", release);
    return (shown) => {
      knob.style.left = `${50 + 50 * shown[0]}%`;
      knob.style.top = `${50 - 50 * shown[1]}%`;
    };
  }

  function makeSliders() {
    const sliders = rest.map((_, d) => {
      const label = document.createElement("label");
      const slider = document.createElement("input");
      Object.assign(slider, { type: "range", min: -1, max: 1, step: 0.01, value: 0 });
      label.append(`action ${d + 1} `, slider);
      holder.append(label);
      slider.addEventListener("pointerdown", () => (dragged = true));
      slider.addEventListener("input", () => {
        rest[d] = Number(slider.value);
        begin();
      });
      slider.addEventListener("pointerup", () => (dims === 1 ? release() : (dragged = false)));
      return slider;
    });
    return (shown) => !dragged && sliders.forEach((slider, d) => (slider.value = shown[d]));
  }

  return {
    show: dims === 2 ? makePad() : makeSliders(),
    hears: (key) => key in ARROWS,
    rests: () => false,
    press(key) {
      keys.add(key);
      begin();
    },
    lift: (key) => keys.delete(key),
    liftAll: () => keys.clear(),
    next() {
      const aim = [...rest];
      for (const key of keys) {
        const [d, sign] = ARROWS[key];
        if (d < dims) aim[d] = clamp(aim[d] + sign, -1, 1);
      }
      const most = dragged ? 2 : RAMP;
      aim.forEach((x, d) => (action[d] += clamp(x - action[d], -most, most)));
      return action.map((x) => Number(x.toFixed(4)));
    },
  };
}

// Buttons for choices, one for each option. An option is taken while its key or its button is held; a choice
// without one takes option 0. While nothing is held, time stands still.
function makeChoosing(holder, choices, begin) {
  const options = choices.flatMap((n, choice) => Array.from({ length: n }, (_, option) => ({ choice, option })));
  const held = new Set(); // places in `options`
  const tapped = new Set(); // pressed since the last decision, perhaps let go again
  const rows = choices.map(() => document.createElement("div"));
  const press = (place) => {
    held.add(place);
    tapped.add(place);
    begin();
  };
  const buttons = options.map(({ choice, option }, place) => {
    const button = document.createElement("button");
    const key = document.createElement("kbd");
    key.textContent = OPTIONS[place]?.toUpperCase() ?? "";
    button.append(choices.length > 1 ? `${choice}: ${option} ` : `action ${option} `, key);
    button.dataset.option = place;
    button.addEventListener("pointerdown", () => press(place));
    for (const end of ["pointerup", "pointerleave", "pointercancel"]) {
      button.addEventListener(end, () => held.delete(place));
    }
    rows[choice].append(button);
    return button;
  });
  rows.forEach((row) => (row.className = "d4-options"));
  holder.replaceChildren(...rows);
  const place = (key) => OPTIONS.indexOf(key.toLowerCase());

  return {
    show: (row) => buttons.forEach((button, i) => button.setAttribute("aria-pressed", row[i] > 0.5)),
    hears: (key) => key.length === 1 && place(key) >= 0 && place(key) < options.length,
    rests: () => !held.size && !tapped.size,
    press: (key) => press(place(key)),
    lift: (key) => held.delete(place(key)),
    liftAll: () => held.clear(),
    next() {
      const chosen = choices.map(() => 0);
      for (const now of [...tapped, ...held]) chosen[options[now].choice] = options[now].option;
      tapped.clear();
      return options.map(({ choice, option }) => Number(chosen[choice] === option));
    },
  };
}

// Frames a second over the last second.
function makeRate(shown) {
  let times = [];
  return (now) => {
    times = [...times.filter((time) => now - time < 1000), now];
    const seconds = (now - times[0]) / 1000;
    if (times.length > 2) shown.textContent = text((times.length - 1) / seconds, 0);
  };
}

function offer(name, bytes) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes]));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function fill(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value, false, value === chosen)));
}

// Plays in `root`; keys are heard from `keyboard`, an element or the document. Returns what ends it.
export function play(root, channel, keyboard) {
  root.classList.add("d4");
  root.innerHTML = VIEW;
  root.tabIndex = -1;
  root.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab's own keys
  const part = (name) => root.querySelector(`[data-part="${name}"]`);
  const plot = makePlot(part("plot"), part("legend"));
  const rate = makeRate(part("rate"));
  const ending = new AbortController();
  const listening = { signal: ending.signal };
  let world = null; // what `hello` said
  let steering = null;
  let running = false;
  let actor = "you";
  let partner = null; // whom H hands over to
  let pending = null;
  let line = Promise.resolve();
  let due = 0;
  let pointed = false;

  function say(words, bad = false) {
    part("status").textContent = words;
    part("status").classList.toggle("d4-bad", bad);
  }

  // One message at a time; resolves with its answer.
  function ask(message) {
    line = line.then(() => new Promise((resolve) => {
      pending = resolve;
      channel.send(message);
    }));
    return line;
  }

  channel.onmessage = (answer, pictures) => {
    if (answer.kind === "error") fail(answer.error);
    if (answer.kind === "hello") meet(answer, pictures);
    if (answer.kind === "frame") show(answer, pictures);
    if (answer.kind === "settings") adopt(answer.settings);
    if (answer.kind === "saved") saved(answer, pictures);
    pending?.(answer);
    pending = null;
  };

  channel.onclose = () => {
    run(false);
    root.querySelectorAll("button, input, select").forEach((control) => (control.disabled = true));
    const said = part("status").classList.contains("d4-bad"); // the reason
    if (!said) say("The connection is closed. Reload the page to play again.", true);
  };

  function fail(words) {
    run(false);
    say(words, true);
  }

  function meet(hello, pictures) {
    world = hello;
    const steer = part("steer");
    const begin = () => run(true);
    const choosing = hello.choices.length > 0;
    steering = choosing ? makeChoosing(steer, hello.choices, begin) : makeSteering(steer, hello.action_dim, begin);
    part("steeringKeys").textContent = choosing ? "1, 2, …" : "arrows";
    part("truth").hidden = hello.missing !== "";
    for (const option of [...part("from").options]) {
      if (!hello.starts.includes(option.value)) option.remove();
    }
    fill(part("steps"), hello.steps, hello.settings.steps);
    fill(part("futures"), hello.futures, hello.settings.futures);
    part("context").max = hello.contexts.length - 1;
    part("actors").replaceChildren(...hello.actors.map((name) => {
      const button = document.createElement("button");
      button.textContent = name;
      button.dataset.actor = name;
      button.addEventListener("click", () => handOver(name));
      return button;
    }));
    adopt(hello.settings);
    partner = hello.actors.find((name) => name !== "you");
    show(hello.frame, pictures);
    const hand = hello.action_dim === 2 ? "drag in the square" : "move the slider";
    const how = choosing ? "hold a button or its key; time stands still while none is held."
      : `press an arrow key or ${hand} to steer the dream.`;
    say(`${hello.task}: ${how}${hello.missing && ` There is no simulator: ${hello.missing}.`}`);
  }

  function adopt(settings) {
    part("steps").value = settings.steps;
    part("futures").value = settings.futures;
    part("context").value = world.contexts.indexOf(settings.context);
    part("contextShown").textContent = text(settings.context, 3);
    actor = settings.actor;
    if (actor !== "you") partner = actor;
    for (const button of part("actors").children) {
      button.setAttribute("aria-pressed", button.dataset.actor === actor);
    }
  }

  function show(frame, [dream, simulator]) {
    paint(part("dream"), dream);
    if (simulator) paint(part("simulator"), simulator);
    if (frame.t === 0) {
      plot.clear();
      say(`Began from ${frame.start}.`);
    }
    plot.add(frame);
    part("since").textContent = `${frame.since} frames since reality`;
    part("disagreement").value = frame.disagreement ?? 0;
    part("disagreement").title = text(frame.disagreement);
    steering.show(frame.action);
    root.dataset.t = frame.t;
    if (!frame.over) return;
    run(false);
    say("The true episode is over. Reset begins another one.");
  }

  function saved(answer, pictures) {
    if (pictures.length) offer(answer.name, pictures[0]);
    say(`Saved: ${answer.path}`);
  }

  async function step() {
    if (!running) return;
    if (actor === "you" && steering.rests()) return run(false);
    await ask({ do: "step", action: steering.next() });
    if (!running) return;
    const now = performance.now();
    rate(now);
    due = part("free").checked ? now : Math.max(due + 1000 / world.fps, now);
    if (due > now) setTimeout(step, due - now);
    else step(); // a timer of zero would wait four milliseconds
  }

  function run(on) {
    if (!world || on === running) return;
    running = on;
    part("pause").textContent = on ? "Pause" : "Play";
    if (!on) {
      steering.liftAll();
      part("rate").textContent = "–";
      return;
    }
    say("");
    due = performance.now();
    step();
  }

  async function handOver(name) {
    await ask({ do: "set", actor: name });
    run(true);
  }

  function reset() {
    const typed = part("number").value;
    const number = typed === "" ? null : Number(typed); // null: a random one
    if (part("from").value === "simulator") return ask({ do: "reset", from: "simulator", seed: number });
    return ask({ do: "reset", from: "demonstration", episode: number });
  }

  const actions = {
    pause: () => run(!running),
    return: () => ask({ do: "return" }),
    reset,
    film: () => ask({ do: "save", as: "film" }),
    episode: () => ask({ do: "save", as: "episode" }),
  };
  for (const [name, action] of Object.entries(actions)) part(name).addEventListener("click", () => world && action());
  const setting = (name, read) => {
    part(name).addEventListener("change", ({ target }) => ask({ do: "set", [name]: read(target.value) }));
  };
  setting("steps", Number);
  setting("futures", Number);
  setting("context", (level) => world.contexts[level]);
  part("context").addEventListener("input", (event) => {
    part("contextShown").textContent = text(world.contexts[event.target.value], 3);
  });

  // After the mouse has used a control, keys steer again; a keyboard's user keeps the focus.
  root.addEventListener("pointerdown", () => (pointed = true), { capture: true });
  root.addEventListener("keydown", () => (pointed = false), { capture: true });
  const refocus = (event) => pointed && event.target.type !== "number" && root.focus({ preventScroll: true });
  root.addEventListener("change", refocus);
  root.addEventListener("click", (event) => event.target.closest("button") && refocus(event));

  const shortcuts = {
    " ": actions.pause,
    h: () => handOver(actor === "you" ? partner : "you"),
    b: actions.return,
    r: actions.reset,
  };
  keyboard.addEventListener("keydown", (event) => {
    const { key, target } = event;
    const typing = target.closest?.("input:not([type=checkbox]), select");
    const pressing = key === " " && target.closest?.("button, summary, input");
    const other = event.ctrlKey || event.metaKey || event.altKey;
    if (!world || typing || pressing || other) return;
    const action = steering.hears(key) ? () => steering.press(key) : shortcuts[key.toLowerCase()];
    if (!action) return;
    event.preventDefault();
    if (!event.repeat) action();
  }, listening);
  keyboard.addEventListener("keyup", (event) => steering?.lift(event.key), listening);
  window.addEventListener("blur", () => steering?.liftAll(), listening);
  document.addEventListener("visibilitychange", () => document.hidden && run(false), listening);

  ask({ do: "hello" });
  return () => {
    run(false);
    ending.abort();
  };
}

const asBytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);

// What anywidget shows in a notebook.
export default {
  render({ model, el }) {
    const channel = { send: (message) => model.send(message) };
    const receive = (answer, buffers) => channel.onmessage(answer, buffers.map(asBytes));
    model.on("msg:custom", receive);
    const end = play(el, channel, el);
    return () => {
      end();
      model.off("msg:custom", receive);
    };
  },
};
