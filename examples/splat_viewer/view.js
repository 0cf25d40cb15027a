// Serves the viewer and one splat file on this machine; with --screenshot Chromium draws it without a window.
//   npm install
//   npm run view -- splats.ply
//   npm run screenshot -- splats.ply splats.png       (CHROMIUM= names the browser, if it is not `chromium`)
import { spawn } from "node:child_process";
import { readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { basename, dirname, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = { ".html": "text/html", ".js": "text/javascript", ".wasm": "application/wasm" };
const FLAGS = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--use-angle=swiftshader",
  "--enable-unsafe-swiftshader", "--window-size=480,560"];
const SECONDS = 300;  // without a GPU the browser may need minutes
const here = dirname(fileURLToPath(import.meta.url));
const [splats, image] = process.argv.slice(2).filter((word) => !word.startsWith("--"));
const screenshot = process.argv.includes("--screenshot");
if (!splats || (screenshot && !image)) {
  console.error("usage: npm run view -- splats.ply, or npm run screenshot -- splats.ply splats.png");
  process.exit(2);
}

let browser;
const server = createServer(async (request, response) => {
  if (request.method === "POST") {  // the page sends its picture, or why there is none
    const chunks = [];
    for await (const chunk of request) chunks.push(chunk);
    response.end();
    if (request.url === "/error") console.error(Buffer.concat(chunks).toString());
    else await writeFile(image, Buffer.concat(chunks));
    browser?.kill();
    process.exit(request.url === "/error" ? 1 : 0);
  }
  const path = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
  const file = path === `/file/${basename(splats)}` ? splats : join(here, path === "/" ? "index.html" : path);
  try {
    const content = await readFile(file);
    response.writeHead(200, { "content-type": TYPES[extname(file)] ?? "application/octet-stream" }).end(content);
  } catch {
    response.writeHead(404).end();
  }
});

server.listen(0, "127.0.0.1", () => {
  const url = `http://127.0.0.1:${server.address().port}/?file=${encodeURIComponent(basename(splats))}`;
  console.log(url);
  if (!screenshot) return;
  browser = spawn(process.env.CHROMIUM ?? "chromium", [...FLAGS, `${url}&screenshot=1`], { stdio: "ignore" });
  setTimeout(() => {
    console.error(`no picture after ${SECONDS} s`);
    browser.kill();
    process.exit(1);
  }, 1000 * SECONDS);
});
