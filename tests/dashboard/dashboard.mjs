// Opens the dashboard of a running gateway in Chromium and checks what it shows.
//
//   node dashboard.mjs ADMIN_URL --key KEY=STATE... [--path /v1/payments] [--method POST] [--scope SCOPE]
//                      [--token TOKEN] [--screenshot FILE.png] [--dark-screenshot FILE.png] [--narrow-screenshot FILE.png]
//                      [--chromium /usr/bin/chromium] [--idle]
//
// There must be traffic while it runs, since the numbers must change; --idle gives up that check.
// Each KEY has to be in its STATE; the first is the one on the screenshots.
// With a token also the way in is checked: none, a wrong one, the right one.
import { chromium } from "playwright-core";
import { parseArgs } from "node:util";

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    key: { type: "string", multiple: true, default: [] }, path: { type: "string", default: "/v1/payments" }, method: { type: "string", default: "POST" },
    scope: { type: "string", default: "" }, token: { type: "string" }, idle: { type: "boolean", default: false },
    screenshot: { type: "string" }, "dark-screenshot": { type: "string" }, "narrow-screenshot": { type: "string" },
    chromium: { type: "string", default: "/usr/bin/chromium" },
  },
});
const keys = options.key.map((pair) => /^(?<key>.+)=(?<state>[a-z]+)$/.exec(pair)?.groups);
if (positionals.length !== 1 || !keys.length || !keys.every(Boolean)) {
  console.error("usage: node dashboard.mjs ADMIN_URL --key KEY=STATE [options]; the file's head tells them");
  process.exit(2);
}
const base = new URL(positionals[0]);
const authorization = options.token ? { Authorization: `Bearer ${options.token}` } : {};
const TOTALS = ["requests", "ran", "replayed", "attached", "in_flight_refused", "mismatched", "interrupted", "invalid", "passed", "unavailable"];

class Failed extends Error {}
function check(holds, message) { if (!holds) throw new Failed(message); }
function equal(found, expected, what) {
  const [f, e] = [JSON.stringify(found), JSON.stringify(expected)];
  check(f === e, `${what}: expected ${e}, found ${f}`);
}
async function until(what, probe, timeout_ms = 15_000) {
  const end = performance.now() + timeout_ms;
  for (;;) {
    const found = await probe();
    if (found) return found;
    check(performance.now() < end, `${what}: not within ${timeout_ms / 1000} s`);
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
}

// ---- the truth, read from the admin listener past the page

const truth = new Map(); // the totals by the time of their sample
const stop = new AbortController();
async function readEvents() {
  const response = await fetch(new URL("events", base), { headers: authorization, signal: stop.signal });
  check(response.ok, `GET /events answered ${response.status}`);
  check(response.headers.get("content-type")?.startsWith("text/event-stream"), "GET /events is not text/event-stream");
  let text = "";
  for await (const part of response.body.pipeThrough(new TextDecoderStream())) {
    text += part;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n");
      if (!data) continue;
      for (const sample of [JSON.parse(data)].flat()) truth.set(sample.at_ms, sample);
    }
  }
}
async function keyOf(key) {
  const body = JSON.stringify({ scope: options.scope, method: options.method, path: options.path, key });
  const response = await fetch(new URL("api/key", base), { method: "POST", headers: { ...authorization, "Content-Type": "application/json" }, body });
  check(response.ok, `POST /api/key answered ${response.status}`);
  return response.json();
}

// ---- pages, watched: nothing may go wrong in them and nothing may leave their origin

const browser = await chromium.launch({ executablePath: options.chromium, headless: true, args: ["--no-sandbox"] });
const complaints = [];
async function open({ token, width = 1280, height = 900, scheme = "light", mayBeRefused = false } = {}) {
  const context = await browser.newContext({ viewport: { width, height }, colorScheme: scheme });
  if (token) await context.addInitScript((t) => { if (!sessionStorage.length) sessionStorage.setItem("oncekey-admin-token", t); }, token);
  const page = await context.newPage();
  page.on("console", (message) => {
    const isRefusal = mayBeRefused && /status of 401/.test(message.text());
    if ((message.type() === "error" || message.type() === "warning") && !isRefusal) complaints.push(`console ${message.type()}: ${message.text()}`);
  });
  page.on("pageerror", (error) => complaints.push(`exception in the page: ${error.stack}`));
  page.on("request", (request) => {
    if (!request.url().startsWith("data:") && new URL(request.url()).origin !== base.origin) complaints.push(`a request left the origin: ${request.url()}`);
  });
  page.on("websocket", (socket) => complaints.push(`a websocket was opened: ${socket.url()}`));
  const response = await page.goto(base.href);
  equal(response.status(), 200, "status of the page");
  page.csp = response.headers()["content-security-policy"] ?? "";
  return page;
}
const isLive = (page) => page.evaluate(() => document.getElementById("feed-text").textContent === "Live" && document.getElementById("sample-time").dateTime !== "");
// Read in one go, so that all the numbers are of one sample.
const shownBy = (page) => page.evaluate(() => {
  const number = (text) => Number(text.replaceAll(",", ""));
  const totals = Object.fromEntries([...document.querySelectorAll("[data-total]")].map((td) => [td.dataset.total, number(td.textContent)]));
  return { at_ms: Date.parse(document.getElementById("sample-time").dateTime), totals, spikes: number(document.getElementById("spikes").textContent.split(" ")[0]),
    line: document.querySelector("#traffic .all-line").getAttribute("d") };
});

async function lookUp(page, key) {
  await page.selectOption("#method", options.method);
  await page.fill("#path", options.path);
  await page.fill("#key", key);
  await page.fill("#scope", options.scope);
  await page.evaluate(() => document.getElementById("answer").replaceChildren());
  await page.press("#key", "Enter");
  await page.waitForSelector("#answer [data-state], #answer strong", { timeout: 10_000 });
  return page.evaluate(() => ({
    state: document.querySelector("#answer [data-state]")?.dataset.state ?? document.getElementById("answer").textContent,
    history: [...document.querySelectorAll("#history tbody tr")].map((row) => [row.cells[1].textContent, row.cells[2].textContent]),
  }));
}

// The contrast of every text that can be seen, against the first opaque ground under it (WCAG 2: 4.5, for large text 3).
const faintTexts = (page) => page.evaluate(() => {
  const rgb = (text) => text.match(/[\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const groundOf = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const c = rgb(getComputedStyle(at).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let text; (text = walker.nextNode()); ) {
    const node = text.parentElement;
    if (!text.textContent.trim() || ["SCRIPT", "STYLE", "NOSCRIPT", "OPTION"].includes(node.tagName) || !node.checkVisibility() || node.disabled) continue;
    const style = getComputedStyle(node);
    const [ink, ground] = [luminance(rgb(node instanceof SVGElement ? style.fill : style.color)), luminance(groundOf(node))];
    const contrast = (Math.max(ink, ground) + 0.05) / (Math.min(ink, ground) + 0.05);
    const isLarge = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.7 && Number(style.fontWeight) >= 700);
    if (contrast < (isLarge ? 3 : 4.5)) faint.push(`"${text.textContent.trim().slice(0, 40)}" ${contrast.toFixed(2)}`);
  }
  return faint;
});
const overflow = (page) => page.evaluate(() => {
  const widest = [...document.body.querySelectorAll("*")].filter((n) => n.checkVisibility() && n.getBoundingClientRect().right > innerWidth + 0.5 && !n.closest(".scroll, .skip"))[0];
  const cut = [...document.querySelectorAll(".plot text")].filter((n) => {
    const [text, plot] = [n, n.ownerSVGElement].map((one) => one.getBoundingClientRect());
    return text.left < plot.left - 0.5 || text.right > plot.right + 0.5;
  }).map((n) => n.textContent);
  return { cut, by: document.documentElement.scrollWidth - innerWidth, of: widest ? widest.id || widest.className.baseVal || widest.className || widest.tagName : "" };
});

// ---- the checks

const checks = {
  async "live numbers arrive and change"() {
    await until("the first numbers", () => isLive(main));
    const first = await shownBy(main);
    const later = await until("a later sample", async () => { const now = await shownBy(main); return now.at_ms > first.at_ms && now.line !== first.line && now; });
    check(later.at_ms - first.at_ms < 10_000, "samples are far apart");
    if (!options.idle) await until("the total of requests grows (is there traffic?)", async () => (await shownBy(main)).totals.requests > first.totals.requests);
  },
  async "the totals shown are those of the feed"() {
    for (let round = 0; round < 3; round++) {
      const last = (await shownBy(main)).at_ms;
      const shown = await until("the next sample", async () => { const now = await shownBy(main); return now.at_ms !== last && now; });
      const real = await until(`the sample of ${shown.at_ms} in a second reading of /events`, () => truth.get(shown.at_ms), 5_000);
      for (const name of TOTALS) equal(shown.totals[name], real.totals[name], `total of ${name}`);
      equal(shown.totals.hits, real.totals.replayed + real.totals.attached + real.totals.in_flight_refused, "total of hits");
      equal(shown.spikes, real.totals.spikes, "spikes since start");
    }
  },
  async "keys show their state and history"() {
    for (const { key, state } of keys.toReversed()) {
      await until(`page and listener agree on ${key}`, async () => {
        const before = await keyOf(key);
        const shown = await lookUp(main, key);
        const after = await keyOf(key);
        if (JSON.stringify(before.history) !== JSON.stringify(after.history) || before.state !== after.state) return false; // changed meanwhile
        equal(before.state, state, `state of ${key} told by the gateway`);
        equal(shown.state, before.state, `state of ${key} shown`);
        equal(shown.history, before.history.map((h) => [h.what.replaceAll("_", " "), h.status === null ? "–" : String(h.status)]), `history of ${key} shown`);
        return true;
      });
    }
    await main.evaluate(() => document.activeElement.blur());
    if (options.screenshot) await main.screenshot({ path: options.screenshot });
  },
  async "an unknown key shows as absent"() {
    equal((await lookUp(main, `never-used-${crypto.randomUUID()}`)).state, "absent", "state of an unknown key");
  },
  async "a path with a query is refused by the form"() {
    await main.fill("#path", `${options.path}?a=1`);
    await main.press("#path", "Enter");
    await until("the refusal", () => main.evaluate(() => document.getElementById("path").getAttribute("aria-invalid") === "true"), 3_000);
  },
  async "pause holds the numbers, and going on shows new ones"() {
    await main.click("#pause");
    const held = await shownBy(main);
    await until("two more samples in the feed", () => [...truth.keys()].filter((at) => at > held.at_ms).length >= 2);
    equal((await shownBy(main)).at_ms, held.at_ms, "time of the numbers while paused");
    await main.click("#pause");
    await until("newer numbers", async () => (await shownBy(main)).at_ms > held.at_ms, 3_000);
  },
  async "the keyboard reads single seconds of a chart"() {
    await main.focus("#traffic");
    await main.keyboard.press("ArrowLeft");
    const said = await main.getAttribute("#traffic", "aria-valuetext");
    check(/^\d\d:\d\d:\d\d: requests [\d,.]+, hits [\d,.]+/.test(said), `aria-valuetext says ${said}`);
    await main.keyboard.press("Escape");
  },
  async "a wrong token shows the form, the right one gets in"() {
    if (!options.token) {
      check(!(await main.isVisible("#gate")), "the form for a token shows though none is asked for");
      return;
    }
    const page = await open({ mayBeRefused: true });
    await page.waitForSelector("#token", { state: "visible" });
    check(!(await page.isVisible("#panels")), "numbers show without a token");
    await page.fill("#token", `${options.token}-wrong`);
    await page.press("#token", "Enter");
    await until("the refusal of a wrong token", () => page.evaluate(() => /did not accept/.test(document.getElementById("gate-error").textContent)));
    check(await page.isVisible("#token"), "the form is gone after a wrong token");
    equal(await page.evaluate(() => sessionStorage.length), 0, "things kept after a wrong token");
    await page.fill("#token", options.token);
    await page.press("#token", "Enter");
    await until("live numbers after the right token", () => isLive(page));
    check(!(await page.isVisible("#gate")), "the form stays after the right token");
    equal(await page.evaluate(() => [localStorage.length, document.cookie, sessionStorage.length]), [0, "", 1], "kept by the page");
    check(!page.url().includes(options.token), "the token is in the URL");
    equal(await page.evaluate((t) => document.documentElement.outerHTML.includes(t), options.token), false, "the token is in the document");
    await page.context().close();
  },
  async "nothing runs over at 360 px"() {
    for (const [width, height] of [[360, 780], [600, 800], [800, 600], [1024, 768]]) {
      const page = await open({ token: options.token, width, height });
      await until("live numbers", () => isLive(page));
      await lookUp(page, keys[0].key);
      equal(await overflow(page), { cut: [], by: 0, of: "" }, `overflow at ${width} px`);
      if (width === 360 && options["narrow-screenshot"]) await page.screenshot({ path: options["narrow-screenshot"], fullPage: true });
      await page.context().close();
    }
  },
  async "light and dark both render, with enough contrast"() {
    const grounds = [];
    for (const scheme of ["light", "dark"]) {
      const page = await open({ token: options.token, scheme });
      await until("live numbers", () => isLive(page));
      await lookUp(page, keys[0].key);
      grounds.push(await page.evaluate(() => getComputedStyle(document.body).backgroundColor.match(/\d+/g).map(Number).reduce((a, b) => a + b) / 3));
      equal(await faintTexts(page), [], `texts of too little contrast, ${scheme}`);
      check((await page.getAttribute("#traffic .all-line", "d")).length > 10, `no line is drawn, ${scheme}`);
      if (scheme === "dark" && options["dark-screenshot"]) await page.screenshot({ path: options["dark-screenshot"] });
      await page.context().close();
    }
    check(grounds[0] > 200 && grounds[1] < 60, `grounds of light and dark: ${grounds}`);
  },
  async "every control has a name, and there are landmarks"() {
    const bare = await main.evaluate(() => [...document.querySelectorAll("input, select, button, [role=slider], section, [tabindex='0']")]
      .filter((n) => !(n.labels?.length || n.textContent.trim() && n.tagName === "BUTTON" || n.getAttribute("aria-label") || n.getAttribute("aria-labelledby"))).map((n) => n.outerHTML.slice(0, 80)));
    equal(bare, [], "controls without a name");
    equal(await main.evaluate(() => ["header", "main", "footer", "h1"].map((name) => document.querySelectorAll(name).length)), [1, 1, 1, 1], "landmarks");
  },
  async "the page is one file with one style and one script, and nothing inline besides"() {
    const html = await (await fetch(base)).text();
    equal(["style", "script"].map((name) => html.split(`<${name}`).length - 1), [1, 1], "styles and scripts");
    const markup = html.replace(/<(style|script)[^>]*>.*?<\/\1>/gs, "");
    equal(markup.match(/<[^>]*\s(style|on[a-z]+)=/g), null, "inline styles and handlers");
    equal(/\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval)\b/.test(html), false, "ways from text to markup or code");
  },
  async "an interrupted key is released once that was confirmed"() {
    const { key } = keys.find(({ state }) => state === "interrupted");
    await lookUp(main, keys.find(({ state }) => state === "completed").key);
    check(await main.isVisible("#erase") && !(await main.isVisible("#release")), "the buttons of a completed key");
    await lookUp(main, keys.find(({ state }) => state === "running").key);
    equal(await main.locator("#deeds").count(), 0, "buttons of a running key");
    await lookUp(main, key);
    await main.click("#release");
    equal(await main.evaluate(() => document.activeElement.id), "cancel", "what has the focus when it is asked");
    await main.click("#cancel");
    equal((await keyOf(key)).state, "interrupted", "state after Cancel");
    await main.click("#release");
    equal(await overflow(main), { cut: [], by: 0, of: "" }, "overflow of the question");
    await main.click("#confirm");
    await until("the new state", () => main.evaluate(() => /^Released\. /.test(document.querySelector("#answer [data-state=absent] + p")?.textContent ?? "")));
    const after = await keyOf(key);
    equal([after.state, after.history.at(-1).what], ["absent", "released_by_operator"], "state after the release");
  },
  async "the page is served under a strict policy and breaks none of it"() {
    check(/default-src 'none'/.test(main.csp) && /connect-src 'self'/.test(main.csp), `Content-Security-Policy: ${main.csp || "none"}`);
    equal(complaints, [], "complaints");
  },
};

let main;
let failed = 0;
try {
  // That it ends by our own will is no failure; anything else is told by the check that waits for its samples.
  readEvents().catch((error) => { if (!stop.signal.aborted) complaints.push(`reading /events: ${error.message}`); });
  main = await open({ token: options.token });
  for (const [name, run] of Object.entries(checks)) {
    try {
      await run();
      console.log(`ok      ${name}`);
    } catch (error) {
      failed += 1;
      console.log(`FAILED  ${name}\n        ${error instanceof Failed ? error.message : error.stack}`);
    }
  }
} catch (error) {
  failed += 1;
  console.log(`FAILED  opening the page\n        ${error.message}`);
} finally {
  stop.abort();
  await browser.close();
}
if (failed) console.error(`${failed} of ${Object.keys(checks).length} checks failed`);
process.exit(failed ? 1 : 0);
