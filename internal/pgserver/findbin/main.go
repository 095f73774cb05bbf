// Findbin prints the folder of PostgreSQL's server programs that the tests would use, and fails if there is none. The
// scripts ask it, so that they decide as the tests do.
package main

import (
	"fmt"
	"os"

	"github.com/preemptable/locker/internal/pgserver"
)

func main() {
	dir, err := pgserver.FindBinDir()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println(dir)
}
