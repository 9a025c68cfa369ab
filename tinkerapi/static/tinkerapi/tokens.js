// Tokens in colours: by weight, advantage, log-probability or ratio; all numbers on hover.
"use strict";

(() => {
  const LABELS = {
    weight: "weight", advantage: "advantage", sampled: "sampler's log-probability",
    trained: "trainer's log-probability", ratio: "ratio, trainer by sampler",
  };
  const FOLDED_FROM = 48; // tokens of a prompt that is folded at first

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const shown = (value) => (value === null || value === undefined ? "–" : String(Number(value.toPrecision(4))));

  // From -1 (bad) over 0 (nothing) to 1 (good), for the colour.
  function scaler(name, values) {
    const known = values.filter((value) => value !== null);
    const largest = Math.max(1e-9, ...known.map(Math.abs));
    if (name === "sampled" || name === "trained") return (value) => -Math.min(1, Math.exp(value) < 0.999 ? -value / 5 : 0);
    if (name === "ratio") return (value) => Math.max(-1, Math.min(1, Math.log(Math.max(value, 1e-9)) / Math.log(2)));
    return (value) => value / largest;
  }

  const SCALES = {
    weight: "blue: trained on, the darker the heavier",
    advantage: "green: made likelier, red: made less likely",
    sampled: "red: unlikely for the sampler", trained: "red: unlikely for the trainer",
    ratio: "green: likelier now than when sampled, red: less likely",
  };

  function colour(name, value, scale) {
    if (value === null || value === undefined) return "";
    const at = scale(value);
    if (!at) return "";
    const rgb = name === "weight" ? "37 99 235" : at > 0 ? "22 163 74" : "220 38 38";
    return `rgb(${rgb} / ${(0.12 + 0.5 * Math.min(1, Math.abs(at))).toFixed(3)})`;
  }

  function start(box) {
    const data = JSON.parse(document.getElementById(box.dataset.tokens).textContent);
    const part = (name) => box.querySelector(`[data-part="${name}"]`);
    const names = Object.keys(data.columns);
    let mode = names.find((name) => data.columns[name].some((value) => value)) || "";
    let isFolded = data.prompt_length > FOLDED_FROM;

    const spans = data.texts.map((text, index) => {
      const span = element("span", "console-token", text.replace(/\n/g, "⏎\n"));
      span.dataset.index = index;
      if (text === "") span.textContent = "·";
      return span;
    });

    function layout() {
      const text = part("text");
      text.replaceChildren();
      if (data.prompt_length && isFolded) {
        const open = element("button", "console-fold", `Show the ${data.prompt_length} tokens before`);
        open.type = "button";
        open.addEventListener("click", () => {
          isFolded = false;
          layout();
        });
        text.append(open);
      }
      text.append(...spans.slice(isFolded ? data.prompt_length : 0));
    }

    function paint() {
      const values = data.columns[mode];
      const scale = values && scaler(mode, values);
      spans.forEach((span, index) => {
        span.style.backgroundColor = values ? colour(mode, values[index], scale) : "";
      });
      part("scale").textContent = SCALES[mode] || "";
    }

    function tell(index) {
      const facts = part("facts");
      const parts = [["token", data.ids[index]], ["text", JSON.stringify(data.texts[index])], ["place", index],
        ...names.map((name) => [LABELS[name] || name, shown(data.columns[name][index])])];
      const list = element("dl");
      for (const [name, value] of parts) {
        const one = element("div");
        one.append(element("dt", "", name), element("dd", "", String(value)));
        list.append(one);
      }
      facts.replaceChildren(list);
      const top = data.top[index] || [];
      if (top.length) {
        const likely = element("ol", "console-likely");
        for (const [text, logprob] of top) {
          const one = element("li");
          one.append(element("code", "", JSON.stringify(text)), element("span", "", ` ${(100 * Math.exp(logprob)).toFixed(1)} %`));
          likely.append(one);
        }
        facts.append(likely);
      }
    }

    for (const name of names) {
      const label = element("label");
      const input = element("input");
      Object.assign(input, { type: "radio", name: "mode", value: name, checked: name === mode });
      input.addEventListener("change", () => {
        mode = name;
        paint();
      });
      label.append(input, ` ${LABELS[name] || name}`);
      part("modes").append(label);
    }
    part("text").addEventListener("mouseover", (event) => {
      if (event.target.dataset.index) tell(Number(event.target.dataset.index));
    });
    part("text").addEventListener("click", (event) => {
      if (event.target.dataset.index) tell(Number(event.target.dataset.index));
    });
    layout();
    paint();
  }

  document.querySelectorAll(".console-tokens").forEach(start);
})();
