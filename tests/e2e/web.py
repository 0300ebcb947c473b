"""A web server as people run them: answers, keeps connections, and on the request to end tells its clients to go before it goes itself.

Runs in a container of the tests by `python3 -c`; the text of this file is the program.
"""

import asyncio
import signal


async def main() -> None:
    ending = asyncio.Event()
    living: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        living.add(asyncio.current_task())
        try:
            while not writer.is_closing():
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                last = ending.is_set() or b"connection: close" in head
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + (b"Connection: close\r\n" if last else b"") + b"\r\nhello")
                await writer.drain()
                if last:
                    writer.close()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
        finally:
            living.discard(asyncio.current_task())

    server = await asyncio.start_server(serve, "0.0.0.0", 80)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    await ending.wait()
    # Those who still ask are told with their next answer; then nobody comes any more.
    if living:
        await asyncio.wait(living, timeout=3)
    server.close()


asyncio.run(main())
