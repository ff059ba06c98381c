// A service worker: what was loaded once opens without a network, too. Files of the model are in a cache of their own.

const PAGES = "dqrm-pages";
const FILES = [".", "page.js", "page.css", "dqrm.js", "worker.js", "files.js", "rows.js", "cells.js", "hashes.js",
  "model.json", "ort.wasm.bundle.min.mjs"];

self.addEventListener("install", (event) => {
  self.skipWaiting();
  event.waitUntil(caches.open(PAGES).then((cache) => cache.addAll(FILES)));
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { request } = event;
  if (request.method !== "GET" || !request.url.startsWith(self.registration.scope) || request.url.includes("?v=")) return;
  event.respondWith(
    fetch(request).then(
      (response) => {
        const copy = response.clone();
        if (response.ok) event.waitUntil(caches.open(PAGES).then((cache) => cache.put(request, copy)));
        return response;
      },
      async (error) => (await caches.match(request, { ignoreSearch: true })) ?? Promise.reject(error),
    ),
  );
});
