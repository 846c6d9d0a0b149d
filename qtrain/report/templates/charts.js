// Charts of details that are closed have no width: they are drawn when these are opened.
const views = [];
const draw = root => Promise.all([...root.querySelectorAll(".chart:empty")]
  .filter(place => !place.closest("details:not([open])"))
  .map(async place => {
    const tooltip = {theme: "page", disableDefaultStyle: true, formatTooltip: (value, clean) => clean(tips[value] ?? value)};
    const options = {config, tooltip, renderer: "svg", actions: false, logLevel: 1};
    const {view} = await vegaEmbed(place, charts[place.dataset.chart], options);
    views.push(view);
  }));
for (const part of document.querySelectorAll("details")) part.addEventListener("toggle", () => draw(part));
