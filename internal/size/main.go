// Size prints the cost of a ten-line program (tenlines) with Datadog and without it: the number of
// packages that it links, its stripped size, and its resident memory while it holds a lock on
// PostgreSQL. Run it with make size.
package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/preemptable/locker/internal/pgserver"
)

const program = "github.com/preemptable/locker/internal/size/tenlines"

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "size:", err)
		os.Exit(1)
	}
}

func run() (err error) {
	ctx := context.Background()
	server, err := pgserver.Shared(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = server.Close() }()
	uri, drop, err := server.NewDatabase(ctx)
	if err != nil {
		return err
	}
	defer drop()
	folder, err := os.MkdirTemp("", "locker-size")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(folder) }()
	fmt.Printf("%s, %s/%s\n\n", runtime.Version(), runtime.GOOS, runtime.GOARCH)
	fmt.Print("| built with | packages | stripped | resident |\n|---|---|---|---|\n")
	for _, tag := range []string{"", "nodatadog"} {
		packages, err := exec.CommandContext(ctx, "go", "list", "-deps", "-tags", tag, program).Output()
		if err != nil {
			return fmt.Errorf("go list: %w", err)
		}
		binary := filepath.Join(folder, "tenlines"+tag)
		if out, err := exec.CommandContext(ctx, "go", "build", "-ldflags=-s -w", "-tags", tag, "-o", binary, program).CombinedOutput(); err != nil {
			return fmt.Errorf("go build: %w\n%s", err, out)
		}
		info, err := os.Stat(binary)
		if err != nil {
			return err
		}
		kib, err := resident(ctx, binary, uri)
		if err != nil {
			return err
		}
		name := "`go build`"
		if tag != "" {
			name = "`go build -tags " + tag + "`"
		}
		fmt.Printf("| %s | %d | %.1f MB | %.1f MB |\n", name, bytes.Count(packages, []byte("\n")), float64(info.Size())/1e6, float64(kib)*1024/1e6)
	}
	return nil
}

// resident starts the program, and returns its resident memory in KiB once it holds its lock.
func resident(ctx context.Context, binary, uri string) (kib int, err error) {
	command := exec.CommandContext(ctx, binary)
	command.Env = append(os.Environ(), "DATABASE_URL="+uri)
	command.Stderr = os.Stderr
	in, err := command.StdinPipe()
	if err != nil {
		return 0, err
	}
	out, err := command.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := command.Start(); err != nil {
		return 0, err
	}
	defer func() {
		// The program then releases its lock and ends.
		_ = in.Close()
		if ended := command.Wait(); err == nil {
			err = ended
		}
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "held\n" {
		return 0, fmt.Errorf("the program holds no lock: %q, %w", line, err)
	}
	shown, err := exec.CommandContext(ctx, "ps", "-o", "rss=", "-p", strconv.Itoa(command.Process.Pid)).Output()
	if err != nil {
		return 0, fmt.Errorf("ps: %w", err)
	}
	return strconv.Atoi(strings.TrimSpace(string(shown)))
}
