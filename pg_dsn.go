package locker

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/lib/pq"
	"github.com/pkg/errors"
)

// dsnFunc returns the connection string for the next connection, in the form of sessionDSN.
type dsnFunc func(ctx context.Context) (string, error)

// uriSource is the argument of WithPostgresURI. Like postgresTarget it is kept behind a pointer.
type uriSource struct {
	ask   func(context.Context) (string, error)
	slots chan struct{} // has one element for each call of ask
}

const (
	// The calls of a uriSource at a time: one for each connection of a provider.
	maxAsks = 4
	// How often other credentials are tried soon after a failed login.
	freshTries = 5
)

// dsnOf returns the source of a provider's connection strings.
func dsnOf(c *LockProviderConfig) (dsnFunc, error) {
	switch {
	case c.postgresURI == nil && c.postgres == nil:
		return nil, errors.New("locker: the postgres provider needs WithPostgresBackend or WithPostgresURI")
	case c.postgresURI == nil:
		return staticDSN(c.postgres.uri)
	case c.postgresURI.ask == nil:
		return nil, errors.New("locker: the function of WithPostgresURI is nil")
	case c.postgres != nil && c.postgres.uri != "":
		return nil, errors.New("locker: WithPostgresBackend and WithPostgresURI both name a server: leave the URI of WithPostgresBackend empty, then it only names the APM service")
	}
	return c.postgresURI.dsn, nil
}

// staticDSN returns a source that always returns the same connection string.
func staticDSN(uri string) (dsnFunc, error) {
	dsn, err := sessionDSN(uri)
	if err != nil {
		return nil, err
	}
	return func(context.Context) (string, error) { return dsn, nil }, nil
}

// dsn calls the function of WithPostgresURI. If that ignores ctx, dsn returns when ctx is done, so
// that no caller and no Close waits for the function.
func (u *uriSource) dsn(ctx context.Context) (string, error) {
	type answer struct {
		uri string
		err error
	}
	select {
	case u.slots <- struct{}{}:
	case <-ctx.Done():
		return "", errors.New("locker: earlier calls of the function of WithPostgresURI have not returned")
	}
	answered := make(chan answer, 1)
	// The goroutine ends when the function returns.
	go func() {
		defer func() { <-u.slots }()
		uri, err := u.ask(ctx)
		answered <- answer{uri, err}
	}()
	select {
	case a := <-answered:
		if a.err != nil {
			// Only the text is used: an error of another server must not be mistaken for an error
			// of this one.
			return "", errors.New("locker: the function of WithPostgresURI: " + withoutSecret(a.err).Error())
		}
		dsn, err := sessionDSN(a.uri)
		if err != nil {
			return "", refusedError{errors.WithMessage(err, "locker: the function of WithPostgresURI")}
		}
		return dsn, nil
	case <-ctx.Done():
		return "", errors.New("locker: the function of WithPostgresURI did not return in time")
	}
}

// withoutSecret returns err, or another error if the text of err may quote a connection string, as
// that of url.Parse does (C31).
func withoutSecret(err error) error {
	text := err.Error()
	if quotedPassword.MatchString(text) || strings.Contains(text, "://") && strings.Contains(text, "@") {
		return errors.New("failed (why is not shown because it may hold a password)")
	}
	return err
}

// quotedPassword allows for spaces, which key=value pairs may have.
var quotedPassword = regexp.MustCompile(`(?i)password\s*=`)

// way provides one goroutine with connection strings for its attempts to connect, and with the
// pauses between them.
type way struct {
	ask   dsnFunc
	last  string        // the string of the last attempt
	fresh int           // attempts with other credentials since the last success
	pause time.Duration // the last one since the last success
}

// dsn returns the string for an attempt to connect.
func (w *way) dsn(ctx context.Context) (string, error) {
	dsn, err := w.ask(ctx)
	if err == nil {
		w.last = dsn
	}
	return dsn, err
}

// connected records that an attempt has succeeded.
func (w *way) connected() { w.fresh, w.pause = 0, 0 }

const (
	reopenMin = 50 * time.Millisecond // the pause between two attempts to connect, doubled with each
	reopenMax = time.Second
	loginMin  = 250 * time.Millisecond // the same after a failed login: too many of them lock an account
	loginMax  = time.Minute
)

// next returns the pause after an attempt that has failed with err. urgent is the result of
// session.urgent.
func (w *way) next(err error, urgent time.Duration) time.Duration {
	least, most := reopenMin, reopenMax
	if isLogin(err) {
		least, most = loginMin, loginMax
		urgent *= 3
	}
	if urgent > 0 {
		most = min(most, urgent/20)
	}
	w.pause = min(max(2*w.pause, least), most)
	// It is random so that the processes of a service do not connect all together.
	return w.pause*3/4 + rand.N(w.pause/2)
}

// rest waits for the pause after a failed attempt, or until ctx is done. After a failed login it
// returns early, and reports that, if there are credentials other than the refused ones. This is
// limited to freshTries, because some functions return another token for each call.
func (w *way) rest(ctx context.Context, pause time.Duration, failed error) (early bool) {
	end := time.NewTimer(pause)
	defer end.Stop()
	look := time.NewTicker(reopenMax)
	defer look.Stop()
	for {
		select {
		case <-end.C:
			return false
		case <-ctx.Done():
			return false
		case <-look.C:
		}
		if !isLogin(failed) || w.fresh >= freshTries {
			continue
		}
		bound, cancel := context.WithTimeout(ctx, openTimeout)
		dsn, err := w.ask(bound)
		cancel()
		if err == nil && dsn != w.last {
			w.fresh++
			return true
		}
	}
}

// isLogin reports whether err means that the server has refused a login.
func isLogin(err error) bool {
	var hosts hostsError
	if errors.As(err, &hosts) {
		return hosts.login
	}
	return stateIn(err, "28")
}

// sessionDSN returns a caller's connection string in a form that connectConfig accepts. Its errors
// never quote the string, which may contain a password (C31).
func sessionDSN(uri string) (string, error) {
	if strings.TrimSpace(uri) == "" {
		return "", errors.New("locker: postgres URI is empty")
	}
	dsn, err := spelledOut(uri)
	if err == nil {
		_, err = connectConfig(dsn)
	}
	return dsn, err
}

// connectConfig returns the configuration that a string of sessionDSN has now. It reads the service
// file and the environment. It adds
//
//   - a name for pg_stat_activity,
//   - a bound for connecting,
//   - arguments in binary format,
//   - TLS, unless the string, the service file or the environment has a setting for it,
//   - the demand for the host that accepts writes, if several hosts are named.
func connectConfig(dsn string) (pq.Config, error) {
	cfg, err := pq.NewConfig(dsn)
	if err != nil {
		return pq.Config{}, invalidURI(err)
	}
	if err := checkParameters(cfg); err != nil {
		return pq.Config{}, err
	}
	if err := checkHosts(cfg); err != nil {
		return pq.Config{}, err
	}
	// The type array needs binary parameters.
	cfg.BinaryParameters = true
	cfg.ApplicationName = cmp.Or(cfg.ApplicationName, applicationName())
	cfg.ConnectTimeout = connectTimeout(cfg)
	// For a socket the driver has set it to "disable".
	cfg.SSLMode = cmp.Or(cfg.SSLMode, pq.SSLModeRequire)
	if len(cfg.Multi) > 0 && (cfg.TargetSessionAttrs == "" || cfg.TargetSessionAttrs == pq.TargetSessionAttrsAny) {
		cfg.TargetSessionAttrs = pq.TargetSessionAttrsReadWrite
	}
	return cfg, nil
}

// checkHosts returns an error for hosts and names that cannot be what the caller means.
func checkHosts(cfg pq.Config) error {
	hosts := append([]pq.ConfigMultihost{{Host: cfg.Host, Hostaddr: cfg.Hostaddr}}, cfg.Multi...)
	sockets, names := 0, make([]string, len(hosts))
	for i, h := range hosts {
		names[i] = h.Host
		// A URL in the wrong place would be quoted as the host that is not found, with its password.
		if strings.Contains(h.Host, "://") {
			return errURLInside
		}
		socket := strings.HasPrefix(h.Host, "/") || strings.HasPrefix(h.Host, "@")
		if socket && !h.Hostaddr.IsValid() {
			sockets++
		}
		// It is a part of a string in another form, and may have a password.
		if !socket && strings.ContainsFunc(h.Host, func(r rune) bool { return unicode.IsSpace(r) || unicode.IsControl(r) || r == '=' || r == ';' }) {
			return invalidURI(errors.New("no host's name"))
		}
	}
	variable := strings.Split(os.Getenv("PGHOST"), ",")
	for i := range variable[1:] {
		variable[i+1] = cmp.Or(variable[i+1], "localhost")
	}
	switch {
	// The driver would add the hosts of the variable to those that take precedence.
	case len(variable) > 1 && !slices.Equal(variable, names):
		return errors.New("locker: environment variable PGHOST: it is a list, and the URI or a service file names hosts as well; unset it for this process")
	case strings.Contains(cfg.Database, "://"), strings.Contains(cfg.User, "://"):
		return errURLInside
	// The driver would use the TLS setting of the first host for all of them.
	case sockets > 0 && sockets < len(hosts):
		return errors.New("locker: postgres URI is invalid: name either hosts or the folders of sockets, because TLS is for hosts only")
	}
	return nil
}

var errURLInside = errors.New("locker: postgres URI is invalid: the host, the user or the database is a URL (the value is not shown because it may hold a password)")

// connectTimeout returns how long an attempt to connect to one host may take: as long as cfg
// allows, or 5 s if it has no bound, but not so long that all attempts together take longer than
// openTimeout. Close waits for these attempts (see openLine), and an outage of the first hosts must
// leave time for the last one.
func connectTimeout(cfg pq.Config) time.Duration {
	attempts := 1 + len(cfg.Multi)
	// The driver tries with TLS and without.
	if cfg.SSLMode == pq.SSLModeAllow || cfg.SSLMode == pq.SSLModePrefer {
		attempts *= 2
	}
	limit := max((openTimeout / time.Duration(attempts)).Truncate(time.Second), time.Second)
	if cfg.ConnectTimeout <= 0 {
		return min(5*time.Second, limit)
	}
	return min(cfg.ConnectTimeout, limit)
}

func wholeSeconds(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }

// pair returns a parameter as a key=value pair.
func pair(name, value string) string {
	return name + "='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value) + "'"
}

// connectionString returns a string that has the same configuration as cfg, whatever the service
// file and the environment say.
func connectionString(cfg pq.Config) string {
	hosts, addresses, ports := []string{cfg.Host}, []string{cfg.Hostaddr.String()}, []string{strconv.Itoa(int(cfg.Port))}
	for _, m := range cfg.Multi {
		hosts, ports = append(hosts, m.Host), append(ports, strconv.Itoa(int(m.Port)))
		// Without an address the host is looked up.
		address := ""
		if m.Hostaddr.IsValid() {
			address = m.Hostaddr.String()
		}
		addresses = append(addresses, address)
	}
	values := reflect.ValueOf(cfg)
	// With an empty service PGSERVICE is ignored.
	pairs := []string{pair("service", "")}
	for _, f := range reflect.VisibleFields(values.Type()) {
		name, value := f.Tag.Get("postgres"), values.FieldByIndex(f.Index)
		if drivers[name] == "" || name == "service" {
			continue
		}
		text := fmt.Sprint(value)
		switch v := value.Interface().(type) {
		case string:
			// An empty string is written as well, because otherwise the environment would count.
		case bool:
			text = "no"
			if v {
				text = "yes"
			}
		case time.Duration:
			text = wholeSeconds(v)
		default:
			if value.IsZero() {
				continue
			}
		}
		switch name {
		case "host":
			// There are only addresses.
			if len(hosts) > 1 && slices.Contains(hosts, "") && cfg.Hostaddr.IsValid() {
				continue
			}
			text = strings.Join(hosts, ",")
		case "hostaddr":
			text = strings.Join(addresses, ",")
		case "port":
			text = strings.Join(ports, ",")
		}
		// The driver appends the rest of a list in the environment.
		if first, _, list := strings.Cut(text, ","); list && lists[name] && strings.Contains(os.Getenv(drivers[name]), ",") {
			text = first
		}
		pairs = append(pairs, pair(name, text))
	}
	for name, value := range cfg.Runtime {
		pairs = append(pairs, pair(name, value))
	}
	return strings.Join(pairs, " ")
}

// lists are the parameters that have a value for each host.
var lists = map[string]bool{"host": true, "hostaddr": true, "port": true}

func isURL(uri string) bool {
	return strings.HasPrefix(uri, "postgres://") || strings.HasPrefix(uri, "postgresql://")
}

// parameters returns the parameters of a URL, or an error if url.URL.Query, which the driver uses,
// would drop one of them. The driver ignores a fragment, so that is an error as well. So is an @ in
// the path: the URL has a password with a slash, and a part of it would count as the database.
func parameters(u *url.URL) (url.Values, error) {
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil || u.Fragment != "" || strings.Contains(u.EscapedPath(), "@") {
		return nil, errParameters
	}
	return q, nil
}

var errParameters = errors.New("locker: postgres URI is invalid: put & between its parameters, and write ; as %3B, # as %23, / as %2F, @ as %40 and % as %25 (the value is not shown because it may hold a password)")

// spelledOut returns a URL with its hosts and ports as parameters, and any other string as it is.
// url.Parse does not accept a socket, and only some versions of Go accept several ports.
func spelledOut(uri string) (string, error) {
	if !isURL(uri) {
		return uri, nil
	}
	scheme, rest, _ := strings.Cut(uri, "://")
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	user, list := "", rest[:end]
	if at := strings.LastIndexByte(list, '@'); at >= 0 {
		user, list = list[:at+1], list[at+1:]
	}
	u, err := url.Parse(scheme + "://" + user + rest[end:])
	if err != nil {
		return "", invalidURI(err)
	}
	q, err := parameters(u)
	if err != nil {
		return "", err
	}
	var hosts, ports []string
	given := false
	for host := range strings.SplitSeq(list, ",") {
		port := "5432"
		if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
			given = given || i+1 < len(host)
			host, port = host[:i], cmp.Or(host[i+1:], port)
		}
		if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
			host = host[1 : len(host)-1]
		}
		host, err := url.PathUnescape(host)
		if err != nil || strings.ContainsAny(host, ",[]") {
			return "", errHosts
		}
		hosts, ports = append(hosts, host), append(ports, port)
	}
	password, _ := u.User.Password()
	for name, value := range map[string]string{"user": u.User.Username(), "password": password, "dbname": strings.TrimPrefix(u.Path, "/")} {
		if value != "" && q.Get(name) != "" {
			return "", errTwice
		}
	}
	names := strings.Join(hosts, ",")
	if names != "" && q.Get("host") != "" || given && q.Get("port") != "" {
		return "", errHosts
	}
	if names != "" {
		q.Set("host", names)
	}
	if given {
		q.Set("port", strings.Join(ports, ","))
	}
	u.RawQuery = q.Encode()
	if u.Path == "" {
		// Without a path, and without a host, String would omit the slashes.
		u.Path = "/"
	}
	return u.String(), nil
}

var errHosts = errors.New("locker: postgres URI is invalid: name hosts, or the folder of a socket, once, by postgres://user@/database?host=a,b&port=5432,5433 or host=a,b port=5432,5433")

var errTwice = errors.New("locker: postgres URI is invalid: name the user, the password and the database once, before the ? or after it")

// These match errors of the driver that name a variable or a parameter. Its value is not shown,
// because it may be a password in the wrong place.
var (
	wrongVariable  = regexp.MustCompile(`^pq: (?:environment variable|wrong value for) \$(\w+)`)
	wrongParameter = regexp.MustCompile(`^pq: wrong value for "([a-z_]+)"`)
	words          = regexp.MustCompile(`[a-z_]+`)
)

// invalidURI explains an error of the driver's parser without quoting the string.
func invalidURI(err error) error {
	text := err.Error()
	if m := wrongVariable.FindStringSubmatch(text); m != nil {
		return errors.Errorf("locker: environment variable %s: github.com/lib/pq does not support it or its value; unset it for this process", m[1])
	}
	if m := wrongParameter.FindStringSubmatch(text); m != nil && drivers[m[1]] != "" {
		return errors.Errorf("locker: postgres URI is invalid: github.com/lib/pq does not support the value of %s (it is not shown because it may hold a password)", m[1])
	}
	// Two settings do not fit together, or the fault is in a service file.
	if strings.HasPrefix(text, "pq: ") {
		var variables []string
		for _, word := range words.FindAllString(text, -1) {
			if variable := drivers[word]; variable != "" && os.Getenv(variable) != "" && !slices.Contains(variables, variable) {
				variables = append(variables, variable)
			}
		}
		if variables != nil {
			return errors.Errorf("locker: environment variable %s: github.com/lib/pq does not support its value, alone or together with what the URI says", strings.Join(variables, " and "))
		}
		if strings.Contains(text, "service") {
			return errors.New("locker: postgres URI is invalid: the service that it or PGSERVICE names is not in the service file (PGSERVICEFILE, otherwise ~/.pg_service.conf), or has a line that github.com/lib/pq does not support")
		}
	}
	return errors.New("locker: postgres URI is invalid: want postgres://user:password@host:port/database?sslmode=… or key=value pairs (the value is not shown because it may hold a password)")
}

// drivers has the parameters that the driver knows, with their environment variables.
var drivers = func() map[string]string {
	all := map[string]string{}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[pq.Config]()) {
		if name := f.Tag.Get("postgres"); name != "" && name != "-" {
			all[name] = f.Tag.Get("env")
		}
	}
	return all
}()

// checkParameters returns an error for a parameter that is known to be neither the driver's nor the
// server's. The driver sends parameters that it does not know to the server, as settings of the
// session. If the server does not know one either, it rejects it at first use.
func checkParameters(cfg pq.Config) error {
	for name := range cfg.Runtime {
		switch lower := strings.ToLower(name); {
		case slices.Contains(foreignParameters, lower), migrateParameter.MatchString(lower):
			return errors.Errorf("locker: postgres URI has the parameter %s, which is for another driver or program: neither github.com/lib/pq nor PostgreSQL knows it; remove it", name)
		case !settingName.MatchString(name):
			// A URL with another scheme is parsed as a pair, and the server would quote its name.
			return invalidURI(errors.New("no setting's name"))
		}
	}
	// The driver reads these variables by other names.
	for variable, version := range map[string]pq.SSLProtocolVersion{
		"PGSSLMINPROTOCOLVERSION": cfg.SSLMinProtocolVersion, "PGSSLMAXPROTOCOLVERSION": cfg.SSLMaxProtocolVersion,
	} {
		if os.Getenv(variable) != "" && version == "" {
			return errors.Errorf("locker: environment variable %s: github.com/lib/pq does not support it: unset it for this process, or set %s in the URI",
				variable, strings.NewReplacer("PGSSL", "ssl_", "PROTOCOL", "_protocol_", "VERSION", "version", "MIN", "min", "MAX", "max").Replace(variable))
		}
	}
	return nil
}

var (
	settingName      = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_$.]*$`)
	migrateParameter = regexp.MustCompile(`^x-[a-z-]+$`)
)

// foreignParameters are parameters that URIs for other drivers often have, in lower case.
var foreignParameters = []string{
	// libpq
	"channel_binding", "gssdelegation", "gssencmode", "gsslib", "keepalives", "keepalives_count", "keepalives_idle",
	"keepalives_interval", "replication", "require_auth", "requirepeer", "requiressl", "scram_client_key", "scram_server_key",
	"servicefile", "sslcertmode", "sslcompression", "sslcrl", "sslcrldir", "sslkeylogfile", "sslpassword",
	// pgx
	"default_query_exec_mode", "description_cache_capacity", "min_read_buffer_size", "pool_health_check_period",
	"pool_max_conn_idle_time", "pool_max_conn_lifetime", "pool_max_conn_lifetime_jitter", "pool_max_conns", "pool_min_conns",
	"pool_min_idle_conns", "prefer_simple_protocol", "statement_cache_capacity", "statement_cache_mode",
	// Prisma
	"connection_limit", "pgbouncer", "pool_timeout", "schema", "socket_timeout", "sslaccept", "sslidentity", "statement_cache_size",
	// JDBC
	"currentschema", "connecttimeout", "logintimeout", "preparethreshold", "rewritebatchedinserts", "sockettimeout", "ssl",
	"sslfactory", "stringtype", "targetservertype", "tcpkeepalive",
	// Node.js
	"connectiontimeoutmillis", "idletimeoutmillis", "max", "min", "uselibpqcompat",
	// Python, Ruby, Rust, .NET
	"adapter", "checkout_timeout", "command_timeout", "conn_health_checks", "conn_max_age", "encoding", "max_overflow", "pool",
	"pool_mode", "pool_pre_ping", "pool_recycle", "pool_size", "pooling", "prepared_statement_cache_size", "prepared_statements",
	"reaping_frequency", "statement-cache-capacity", "timeout",
}
