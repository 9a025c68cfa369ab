// Conversations with one or two models. Each side has its own answers; the messages are shared.
"use strict";

(() => {
  const form = document.getElementById("playground");
  if (!form) return;

  const fields = form.elements;
  const facts = form.querySelector('[data-part="facts"]');
  const sides = [...form.querySelectorAll(".console-play-side")].map((section) => ({
    model: section.querySelector("select"),
    turns: section.querySelector('[data-part="turns"]'),
    history: [], // {role, content}, without the system message
    section,
  }));
  let running = null; // aborts the requests under way

  const element = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const percent = (logprob) => `${(100 * Math.exp(logprob)).toPrecision(3)} %`;
  const visible = (text) => JSON.stringify(text).slice(1, -1) || "·";

  function body(side) {
    const number = (name) => (fields[name].value === "" ? undefined : Number(fields[name].value));
    const system = fields.system.value.trim();
    return {
      model: side.model.value,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...side.history],
      temperature: number("temperature"),
      top_p: number("top_p"),
      top_k: number("top_k"),
      max_tokens: number("max_tokens"),
      seed: number("seed"),
      stop: fields.stop.value ? [fields.stop.value] : undefined,
      stream: true,
      stream_options: { include_usage: true },
      logprobs: true,
      top_logprobs: Number(form.dataset.top),
    };
  }

  function turn(side, role, text) {
    const item = element("li", `is-${role}`);
    item.append(element("span", "console-play-role", role));
    const content = element("div", "console-play-text", text);
    item.append(content);
    side.turns.append(item);
    return { item, content };
  }

  // The events of a stream: each is one JSON object.
  async function* events(response) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        const data = part.replace(/^data: /, "");
        if (data !== "[DONE]") yield JSON.parse(data);
      }
    }
  }

  function tokens(content, logprobs) {
    const spans = logprobs.map((token) => {
      const span = element("span", "console-token", token.token);
      const doubt = 1 - Math.exp(token.logprob);
      if (doubt > 0.01) span.style.backgroundColor = `rgb(220 38 38 / ${(0.45 * doubt).toFixed(3)})`;
      span.tabIndex = 0;
      const tell = () => {
        const likely = element("ol", "console-likely");
        for (const other of token.top_logprobs) {
          const one = element("li");
          one.append(element("code", "", `"${visible(other.token)}"`), ` ${percent(other.logprob)}`);
          likely.append(one);
        }
        facts.replaceChildren(element("strong", "", `"${visible(token.token)}" ${percent(token.logprob)}`), likely);
      };
      for (const kind of ["mouseenter", "focus", "click"]) span.addEventListener(kind, tell);
      return span;
    });
    content.replaceChildren(...spans);
  }

  async function answer(side, signal) {
    const { item, content } = turn(side, "assistant", "");
    const note = element("p", "console-play-note", "waiting…");
    item.append(note);
    let text = "";
    try {
      const response = await fetch(form.dataset.url, {
        method: "POST",
        signal,
        headers: { "Content-Type": "application/json", "X-CSRFToken": fields.csrfmiddlewaretoken.value },
        body: JSON.stringify(body(side)),
      });
      if (!response.ok) throw new Error((await response.json()).error.message);
      const id = response.headers.get("x-request-id");
      let ended = "";
      for await (const event of events(response)) {
        if (event.error) throw new Error(event.error.message);
        const [choice] = event.choices;
        if (choice) {
          text += choice.delta.content || "";
          content.textContent = text;
          note.textContent = "…";
          if (choice.logprobs) tokens(content, choice.logprobs.content);
          if (choice.finish_reason) ended = choice.finish_reason;
        }
        if (event.usage) {
          note.replaceChildren(
            `${event.usage.completion_tokens} tokens${ended === "length" ? ", cut at the limit" : ""} · `,
            link(`${form.dataset.requests}${id}/change/`, "request"),
          );
        }
      }
      side.history.push({ role: "assistant", content: text });
    } catch (error) {
      note.textContent = error.name === "AbortError" ? "stopped" : error.message;
      note.classList.toggle("is-error", error.name !== "AbortError");
      if (text) side.history.push({ role: "assistant", content: text });
    }
  }

  function link(url, text) {
    const made = element("a", "text-link", text);
    made.href = url;
    return made;
  }

  function busy(is) {
    fields.send.disabled = is;
    fields.stop_all.hidden = !is;
    fields.again.hidden = fields.clear.hidden = is || !sides.some((side) => side.history.length);
  }

  async function ask(prompt) {
    const chosen = sides.filter((side) => side.model.value);
    running = new AbortController();
    busy(true);
    for (const side of chosen) {
      side.history.push({ role: "user", content: prompt });
      turn(side, "user", prompt);
    }
    await Promise.all(chosen.map((side) => answer(side, running.signal)));
    running = null;
    busy(false);
  }

  function show() {
    form.classList.toggle("has-two", Boolean(sides[1].model.value));
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const prompt = fields.prompt.value.trim();
    if (!prompt || running) return;
    fields.prompt.value = "";
    ask(prompt);
  });
  fields.prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  fields.stop_all.addEventListener("click", () => running && running.abort());
  fields.again.addEventListener("click", () => {
    // The last message again, with the settings as they are now.
    let prompt = "";
    for (const side of sides) {
      while (side.history.length && side.history.at(-1).role === "assistant") side.history.pop();
      const last = side.history.pop();
      if (last) prompt = last.content;
      for (let item = side.turns.lastElementChild; item; item = side.turns.lastElementChild) {
        item.remove();
        if (item.className === "is-user") break;
      }
    }
    if (prompt) ask(prompt);
  });
  fields.clear.addEventListener("click", () => {
    for (const side of sides) {
      side.history = [];
      side.turns.replaceChildren();
    }
    busy(false);
  });
  sides[1].model.addEventListener("change", show);
  window.addEventListener("pagehide", () => running && running.abort());
  show();
})();
