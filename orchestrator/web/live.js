// Replace what the page shows while it changes; without this script a page is whole, and is read anew by hand.
"use strict";
const content = document.getElementById("content");
const link = document.getElementById("link");
const source = new EventSource(content.dataset.events);
source.onopen = () => { link.hidden = true; };
source.onmessage = (event) => { content.innerHTML = event.data; };
source.onerror = () => { link.hidden = false; };
addEventListener("pagehide", () => source.close());
