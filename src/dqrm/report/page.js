"use strict";
(async () => {
  const PALETTES = {
    light: ["#0b5fa5", "#b8420f", "#00734f", "#8a3d8f", "#7a5c00", "#00707f", "#a3244d", "#4d4d4d", "#5a4fcf", "#3f6b00"],
    dark: ["#6cb6ff", "#ff9f6b", "#4fd1a5", "#d79be0", "#e3c14d", "#4fd0e0", "#ff8fb0", "#c0c0c0", "#a9a3ff", "#a6d65a"],
  };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const inflate = async (id) => {
    const packed = Uint8Array.from(atob(document.getElementById(id).textContent), (each) => each.charCodeAt(0));
    return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const config = (width) => {
    const [ink, soft, line] = dark.matches ? ["#e6e9f0", "#a3adc2", "#3a4256"] : ["#1c2230", "#59637a", "#d5dae4"];
    const columns = Math.max(1, Math.min(3, Math.floor(width / 210)));
    return {
      background: "transparent",
      font: "system-ui, sans-serif",
      view: { stroke: null },
      axis: { labelColor: soft, titleColor: soft, gridColor: line, domainColor: line, tickColor: line,
        labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal" },
      legend: { orient: "bottom", columns, direction: "horizontal", labelColor: ink, labelFontSize: 12, symbolSize: 90, symbolOpacity: 1,
        labelLimit: Math.floor(width / columns) - 75, title: null },
      range: { category: PALETTES[dark.matches ? "dark" : "light"] },
      rule: { color: soft },
      text: { color: soft, fontSize: 11 },
    };
  };
  const fail = (error) => {
    const told = document.getElementById("failed");
    told.textContent = `The plots could not be drawn (${error}); the tables hold their figures.`;
    told.hidden = false;
  };
  let queue = Promise.resolve(); // one after the other: the first is seen before the last is drawn
  const draw = (place, spec) => {
    queue = queue
      .then(() => vegaEmbed(place, spec, { config: config(place.clientWidth), renderer: "svg", actions: false, ast: true }))
      .then(() => (place.dataset.drawn = "true"))
      .then(() => new Promise((resume) => setTimeout(resume)))
      .catch(fail);
  };
  const watch = (plots) => {
    const specs = new Map(plots.map(({ id, spec }) => [document.getElementById(id), spec]));
    // What is far from the screen is drawn when the reader comes near, or prints.
    const near = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (isIntersecting) {
          near.unobserve(target);
          draw(target, specs.get(target));
        }
      }
    }, { rootMargin: "400px" });
    for (const place of specs.keys()) near.observe(place);
    const again = () => {
      for (const [place, spec] of specs) if (place.dataset.drawn) draw(place, spec);
    };
    dark.addEventListener("change", again);
    matchMedia("(min-width: 700px)").addEventListener("change", again);
    addEventListener("beforeprint", () => {
      for (const [place, spec] of specs) if (!place.dataset.drawn) draw(place, spec);
    });
  };
  try {
    const library = document.createElement("script");
    library.textContent = await inflate("library");
    document.head.append(library);
    watch(JSON.parse(await inflate("plots")));
  } catch (error) {
    fail(error);
  }
})();
