package pgserver

import (
	"fmt"
	"os"
	"os/exec"
)

// watchdog is a shell that outlives us. It reads the postmaster's process id, 0 while there is none, from a pipe whose other
// end only this process holds. The end of the pipe means that this process is gone, however it ended: then the shell stops
// the server, which cleans up its shared memory itself, and removes the folder, unless Close already has.
//
// A parent-death signal would do less: it exists on Linux only, is tied to a thread, and leaves the folder.
type watchdog struct {
	cmd  *exec.Cmd
	pipe *os.File
}

// The server may be frozen, hence CONT. A postmaster that is waited for by nobody stays visible as a zombie, hence the bound.
const watchdogScript = `
trap '' HUP INT QUIT TERM
pid=0
while read -r line; do pid=$line; done
if [ "$pid" -gt 0 ]; then
	kill -QUIT "$pid" && kill -CONT "$pid"
	i=0
	while kill -0 "$pid" && [ -e "$1/data/postmaster.pid" ] && [ $i -lt 100 ]; do
		sleep 0.1
		i=$((i + 1))
	done
	kill -KILL "$pid"
fi
rm -rf "$1"
`

func watch(dir string) (*watchdog, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	// Standard output stays unconnected: whoever waits for the end of ours, such as go test, must not wait for this shell.
	cmd := exec.Command("/bin/sh", "-c", watchdogScript, "pgserver-watchdog", dir)
	cmd.Dir = "/"
	cmd.Stdin = r
	detach(cmd)
	err = cmd.Start()
	_ = r.Close()
	if err != nil {
		_ = w.Close()
		return nil, fmt.Errorf("pgserver: watchdog: %w", err)
	}
	return &watchdog{cmd: cmd, pipe: w}, nil
}

func (w *watchdog) running(pid int) {
	// If somebody ended the shell, the server is just less guarded.
	_, _ = fmt.Fprintln(w.pipe, pid)
}

func (w *watchdog) dismiss() error {
	_ = w.pipe.Close()
	_ = w.cmd.Wait()
	return nil
}
