'use strict';
// node-http-proxy with a keep-alive agent, as its users write it: node proxy.js PORT TARGET_PORT.
const http = require('http');
const httpProxy = require('http-proxy');

const proxy = httpProxy.createProxyServer({
  target: `http://127.0.0.1:${process.argv[3]}`,
  agent: new http.Agent({ keepAlive: true }),
});
proxy.on('error', (error, request, response) => {
  if (!response.writeHead) return response.destroy(); // the socket of an upgrade
  if (response.headersSent) return undefined;
  response.writeHead(502);
  return response.end();
});
const server = http.createServer((request, response) => {
  response.on('error', () => {}); // else the process dies of what comes behind its 502
  try {
    proxy.web(request, response);
  } catch { // a name that Node 18 reads, and does not write
    response.destroy();
  }
});
server.on('upgrade', (request, socket, head) => {
  socket.on('error', () => {});
  proxy.ws(request, socket, head);
});
server.keepAliveTimeout = 0;
server.listen(Number(process.argv[2]), '127.0.0.1');
