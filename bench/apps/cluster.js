// For listen.py: server.listen() until 'listening' in a cluster worker.
const cluster = require('cluster')
const http = require('http')
// the workers that are forked at a time while the primary is busy
const CHURNERS = 2
const { policy, held, fresh, calls, pace } = JSON.parse(process.env.BENCH)
cluster.schedulingPolicy = policy === 'rr' ? cluster.SCHED_RR : cluster.SCHED_NONE
const now = () => Number(process.hrtime.bigint()) / 1e9
const sleep = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000))

function listen (port) {
  return new Promise((resolve, reject) => {
    const server = http.createServer((request, response) => response.end('ok'))
    server.on('error', reject)
    const start = now()
    server.listen(port, '127.0.0.1', () => {
      const answered = now()
      server.close(() => resolve([answered - start, now() - start]))
    })
  })
}

async function measure ({ id, portIs }) {
  const times = []
  await listen(held)
  for (let i = 0; i < calls; i++) {
    await sleep(pace)
    times.push(await listen(portIs === 'open' ? held : fresh + i))
  }
  process.send({ id, times })
}

async function primary () {
  const holder = cluster.fork({ ROLE: 'holder' })
  await new Promise((resolve) => holder.once('message', resolve))
  const worker = cluster.fork({ ROLE: 'measurer' })
  await new Promise((resolve) => worker.once('message', resolve))
  let busy = false
  let forks = 0
  const churn = () => {
    if (!busy) return
    forks++
    const child = cluster.fork({ ROLE: 'churner' })
    child.once('message', () => child.process.kill('SIGTERM'))
    child.once('exit', churn)
  }
  const results = []
  for (const state of ['idle', 'busy']) {
    busy = state === 'busy'
    for (let i = 0; busy && i < CHURNERS; i++) churn()
    for (const portIs of ['open', 'new']) {
      const answer = new Promise((resolve) => worker.once('message', resolve))
      worker.send({ id: results.length, portIs })
      results.push({ state, portIs, times: (await answer).times })
    }
  }
  busy = false
  process.stdout.write(JSON.stringify({ results, forks }) + '\n', () => process.exit(0))
}

if (cluster.isPrimary) {
  primary()
} else if (process.env.ROLE === 'measurer') {
  process.on('message', measure)
  process.send('up')
} else { // holder, churner
  http.createServer().listen(held, '127.0.0.1', () => process.send('up'))
}
