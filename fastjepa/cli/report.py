"""`fastjepa report`: one HTML page of runs, in a file or served while they go on."""

import argparse
import sys
from pathlib import Path

from fastjepa.cli.options import add_command, non_negative_int

REPORT_EXAMPLES = """examples:
  fastjepa report runs/demo
  fastjepa report runs/demo runs/cifar10 --output compared.html
  fastjepa report runs/demo --serve --port 8000

The page holds everything it shows, needs no network, and can be sent, printed and kept. --serve writes no file: the page
that it serves renews itself. On another machine: ssh -L 8000:localhost:8000 HOST, then http://localhost:8000/."""


def register(commands) -> None:
    sub = add_command(commands, "report", run_report, "one HTML page of a run, or of several side by side", REPORT_EXAMPLES)
    sub.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory; it may still be training")
    out = "where the page goes (default: RUN/report.html, or report.html here for several runs)"
    sub.add_argument("--output", type=Path, metavar="FILE", help=out)
    sub.add_argument("--no-pictures", action="store_true", help="leave out masks, principal components and other pictures")
    sub.add_argument("--serve", action="store_true", help="serve the page, renewed as the runs go on, until Ctrl-C")
    sub.add_argument("--host", default="127.0.0.1", help="address to serve on (default 127.0.0.1: this machine alone)")
    sub.add_argument("--port", type=non_negative_int, default=0, help="default 0: a free one")


def run_report(args: argparse.Namespace) -> None:
    if args.serve:
        run_server(args)
        return
    from rich.console import Console

    from fastjepa.report.page import write_page

    file = args.output or (args.runs[0] / "report.html" if len(args.runs) == 1 else Path("report.html"))
    with Console(stderr=True).status("reading and drawing"):
        write_page(args.runs, file, not args.no_pictures)
    print(file)


def run_server(args: argparse.Namespace) -> None:
    from fastjepa.report.watch import Server, is_loopback

    with Server(args.runs, args.host, args.port, not args.no_pictures) as server:
        server.page()  # a mistake is said here
        if not is_loopback(server.server_address[0]):
            print(f"whoever reaches {args.host} can read this page", file=sys.stderr)
        try:
            print(f"{server.address} (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", file=sys.stderr)
