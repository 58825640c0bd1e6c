"""A relay in user space that holds everything back for a while: `delay.py LISTEN TARGET MILLISECONDS`.

For kernels without netem. It works on TCP streams, so the systems' own windows see the long way, the kernel's do not.
"""

import asyncio
import sys

PIECE_BYTES = 64 << 10
# On the way in one direction; more waits in the sender's socket, as on a real link.
PIECES_MAX = 1600


async def collect(reader, pieces, seconds):
    """Read whatever comes and note when it is due."""
    loop = asyncio.get_running_loop()
    while piece := await reader.read(PIECE_BYTES):
        await pieces.put((loop.time() + seconds, piece))
    await pieces.put((loop.time() + seconds, b""))


async def deliver(pieces, writer):
    """Write every piece when it is due; an empty one is the end."""
    loop = asyncio.get_running_loop()
    while True:
        due, piece = await pieces.get()
        await asyncio.sleep(max(0.0, due - loop.time()))
        if not piece:
            writer.write_eof()
            return
        writer.write(piece)
        await writer.drain()


async def main():
    """Relay until killed."""
    (host, port), (far_host, far_port) = (text.rsplit(":", 1) for text in sys.argv[1:3])
    seconds = float(sys.argv[3]) / 1000

    async def relay(near_reader, near_writer):
        try:
            far_reader, far_writer = await asyncio.open_connection(far_host, int(far_port))
        except OSError:
            near_writer.close()
            return
        there, back = asyncio.Queue(PIECES_MAX), asyncio.Queue(PIECES_MAX)
        ways = [
            collect(near_reader, there, seconds),
            deliver(there, far_writer),
            collect(far_reader, back, seconds),
            deliver(back, near_writer),
        ]
        tasks = [asyncio.ensure_future(way) for way in ways]
        try:
            await asyncio.gather(*tasks)
        except OSError:
            pass  # A connection that breaks takes both directions with it.
        finally:
            for task in tasks:
                task.cancel()
            near_writer.close()
            far_writer.close()

    server = await asyncio.start_server(relay, host, int(port))
    print("ready", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
