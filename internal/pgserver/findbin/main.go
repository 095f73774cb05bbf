// Findbin prints the folder of PostgreSQL's server programs that the tests would use, or nothing if
// there is none. It fails if the folder that the environment names has none. The scripts call it,
// so that they decide like the tests.
package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/preemptable/locker/internal/pgserver"
)

func main() {
	dir, err := pgserver.FindBinDir()
	switch {
	case err == nil:
		fmt.Println(dir)
	case !errors.Is(err, pgserver.ErrNoBinaries):
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
