package pgserver

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"time"
)

// StandbyOptions are the settings of a standby.
type StandbyOptions struct {
	Name        string            // its name for the primary, or empty for a unique name
	Synchronous bool              // the primary's commits wait for this standby from now on, even if it ends
	Config      map[string]string // settings that override those copied from the primary
	Port        int               // 0 for a free one
}

// Standby creates a read-only streaming copy of the running server and starts it. It returns when
// the standby follows, or, for a synchronous one, when commits wait for it. To end that, Set the
// primary's synchronous_standby_names to "". Without pg_basebackup it returns an error that matches
// ErrNoBinaries.
func (s *Server) Standby(ctx context.Context, opts StandbyOptions) (*Server, error) {
	if s.PID() == 0 {
		return nil, ErrNotRunning
	}
	// The npm packages contain only the programs that a server needs.
	if _, err := os.Stat(filepath.Join(s.binDir, "pg_basebackup")); err != nil {
		return nil, fmt.Errorf("%w: no pg_basebackup in %s", ErrNoBinaries, s.binDir)
	}
	inherited := s.opts
	inherited.BinDir, inherited.Port = s.binDir, opts.Port
	standby, err := prepare(ctx, inherited)
	if err != nil {
		return nil, err
	}
	if opts.Name == "" {
		opts.Name = uniqueName("standby")
	}
	if err := s.makeStandby(ctx, standby, opts); err != nil {
		return nil, errors.Join(err, standby.Close())
	}
	return standby, nil
}

func (s *Server) makeStandby(ctx context.Context, standby *Server, opts StandbyOptions) error {
	source, err := url.Parse(s.URI("postgres"))
	if err != nil {
		return err
	}
	query := source.Query()
	query.Set("application_name", opts.Name)
	source.RawQuery = query.Encode()
	err = standby.run(ctx, "pg_basebackup", "--pgdata", standby.DataDir(), "--dbname", source.String(),
		"--write-recovery-conf", "--wal-method", "stream", "--checkpoint", "fast", "--no-sync")
	if err != nil {
		return err
	}
	if err := standby.configure(opts.Config); err != nil {
		return err
	}
	if err := standby.Start(ctx); err != nil {
		return err
	}
	want := "streaming"
	if opts.Synchronous {
		if err := s.Set(ctx, "synchronous_standby_names", `"`+opts.Name+`"`); err != nil {
			return err
		}
		want = "sync"
	}
	return s.await(ctx, `SELECT count(*) > 0 FROM pg_stat_replication WHERE application_name = $1 AND $2 IN (state, sync_state)`,
		opts.Name, want)
}

// Promote makes a standby a primary. The old primary is not informed.
func (s *Server) Promote(ctx context.Context) error {
	if err := s.Exec(ctx, "SELECT pg_promote(false)"); err != nil {
		return fmt.Errorf("pgserver: promote: %w", err)
	}
	return s.await(ctx, "SELECT NOT pg_is_in_recovery()")
}

// await repeats a query until it returns true.
func (s *Server) await(ctx context.Context, query string, args ...any) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return withDB(s.URI("postgres"), func(db *sql.DB) error {
		for {
			var yes bool
			if err := db.QueryRowContext(ctx, query, args...).Scan(&yes); err != nil {
				return fmt.Errorf("pgserver: waiting for %s: %w", query, err)
			}
			if yes {
				return nil
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("pgserver: waiting for %s: %w", query, context.Cause(ctx))
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
}
