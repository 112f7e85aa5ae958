// For beside.py: two workers of Node's cluster, each of which opens two ports as if it were alone.
const cluster = require('cluster')
const http = require('http')

if (cluster.isPrimary) {
  console.log(`reload: ${typeof cluster.reload}`)
  cluster.fork()
  cluster.fork()
} else {
  for (const port of [process.env.BENCH_PORT, process.env.BENCH_SECOND]) {
    http.createServer((request, response) => response.end(String(process.pid))).listen(port, '127.0.0.1')
  }
}
