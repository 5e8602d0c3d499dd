// Repaints every heat map when the slider moves. Without the script the last snapshot is shown.
(() => {
  const data = JSON.parse(document.getElementById("snapshots").textContent);
  const maps = [...document.querySelectorAll("figure.map")];
  const bar = document.getElementById("bar");
  const slider = document.getElementById("slider");
  const epoch = document.getElementById("epoch");

  const repaint = (map, values) => {
    const squares = map.querySelectorAll("rect");
    const texts = map.querySelectorAll("text.n");
    const size = Math.round(Math.sqrt(squares.length));
    squares.forEach((square, at) => {
      const row = Math.floor(at / size), column = at % size;
      const i = Math.min(row, column), j = Math.max(row, column);
      const value = values[i * size - (i * (i - 1)) / 2 + j - i]; // of the upper triangle
      square.setAttribute("fill", data.colours[value]);
      if (texts.length) {
        texts[at].textContent = value === 100 ? "1" : "." + String(value).padStart(2, "0");
        texts[at].setAttribute("class", "n " + (value > 60 ? "dark" : "light"));
      }
    });
  };

  slider.addEventListener("input", () => {
    const time = Number(slider.value);
    epoch.textContent = data.epochs[time];
    maps.forEach((map, number) => repaint(map, data.maps[number][time]));
  });
  bar.hidden = false;
})();
