package pgserver

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// EnvBin names a folder with initdb and postgres. If they are missing there, no other folder is
// searched.
const EnvBin = "LOCKER_TEST_POSTGRES_BIN"

// ErrNoBinaries means that no PostgreSQL server programs were found.
var ErrNoBinaries = errors.New("pgserver: no PostgreSQL server programs (initdb, postgres) found; install them or set " + EnvBin)

// FindBinDir returns a folder with PostgreSQL's server programs. It searches the folder that
// LOCKER_TEST_POSTGRES_BIN names, then the folders of pg_config and postgres in PATH, and then the
// usual places of packages, the newest first.
func FindBinDir() (string, error) {
	if dir := os.Getenv(EnvBin); dir != "" {
		if !hasServer(dir) {
			return "", fmt.Errorf("pgserver: %s=%s: no initdb and postgres in there", EnvBin, dir)
		}
		return dir, nil
	}
	var dirs []string
	if out, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		dirs = append(dirs, strings.TrimSpace(string(out)))
	}
	if path, err := exec.LookPath("postgres"); err == nil {
		if real, err := filepath.EvalSymlinks(path); err == nil {
			dirs = append(dirs, filepath.Dir(real))
		}
		dirs = append(dirs, filepath.Dir(path))
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin",
		"/usr/lib/postgresql*/bin",
		"/usr/pgsql-*/bin",
		"/usr/libexec/postgresql*",
		"/opt/homebrew/opt/postgresql*/bin",
		"/usr/local/opt/postgresql*/bin",
		"/home/linuxbrew/.linuxbrew/opt/postgresql*/bin",
		"/Applications/Postgres.app/Contents/Versions/*/bin",
		"/usr/local/pgsql/bin",
	} {
		found, _ := filepath.Glob(pattern)
		slices.SortFunc(found, func(a, b string) int { return majorOf(b) - majorOf(a) })
		dirs = append(dirs, found...)
	}
	for _, dir := range dirs {
		if hasServer(dir) {
			return dir, nil
		}
	}
	return "", ErrNoBinaries
}

func hasServer(dir string) bool {
	for _, program := range []string{"initdb", "postgres"} {
		info, err := os.Stat(filepath.Join(dir, program))
		if err != nil || info.IsDir() || info.Mode()&0o111 == 0 {
			return false
		}
	}
	return true
}

// majorOf returns the version in a path such as /usr/pgsql-16/bin, or -1 if there is none.
func majorOf(dir string) int {
	digits := strings.FieldsFunc(dir, func(r rune) bool { return r < '0' || r > '9' })
	if len(digits) == 0 {
		return -1
	}
	n, err := strconv.Atoi(digits[0])
	if err != nil {
		return -1
	}
	return n
}
