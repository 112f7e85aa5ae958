// fast-proxy with undici's pool of connections:
//     node fast-proxy.js TARGET SOCKET
'use strict'

const http = require('node:http')
const [target, path] = process.argv.slice(2)

const { proxy } = require('fast-proxy')({ base: target, undici: { connections: 100, pipelining: 1 } })

http.createServer((request, response) => proxy(request, response, request.url, {})).listen(path)
