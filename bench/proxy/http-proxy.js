// node-http-proxy, or http-proxy-3, which has the same interface, with an agent that keeps connections:
//     node http-proxy.js PACKAGE TARGET SOCKET
'use strict'

const http = require('node:http')
const [name, target, path] = process.argv.slice(2)

const agent = new http.Agent({ keepAlive: true })
const proxy = require(name).createProxyServer({ target, agent, ws: true })
proxy.on('error', (error) => console.error(error))

http
  .createServer((request, response) => proxy.web(request, response))
  .on('upgrade', (request, socket, head) => proxy.ws(request, socket, head))
  .listen(path)
