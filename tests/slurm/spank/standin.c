/*
 * A stand-in for pyxis on the test cluster. It is a contract test of the flags, not pyxis: it registers the same srun
 * options, gives every task the file system and the environment that those options promise, and refuses what the
 * project must not use. It unpacks nothing, pulls nothing, knows no user namespaces and needs root. The same tests
 * run under the real pyxis and enroot when plugstack.conf names those instead.
 *
 * What it holds to, as pyxis and enroot do:
 *   - the image is a squashfs file, or a folder; read-only unless --container-writable, changes go with the step;
 *   - mounts are SOURCE:TARGET[:FLAG+FLAG], joined by commas; a missing source ends the step with one line;
 *   - /tmp is fresh and shared by the tasks of a node; /proc, /sys, /dev and /etc/hosts are the host's;
 *   - the environment of the image (its /etc/environment) beats the job's, unless --container-env names the variable;
 *   - LANG and LC_ALL are dropped; an image with PYTORCH_VERSION gets RANK, MASTER_ADDR and so on from enroot's hook;
 *   - the home folder is not there unless --container-mount-home.
 * Arguments in plugstack.conf: scratch=FOLDER (an empty folder, the mount point) and record=FOLDER (one file a task,
 * JOB.STEP.RANK, with the options it got).
 *
 *   gcc -shared -fPIC -Wall -Wextra -Werror -o standin.so standin.c
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <slurm/spank.h>

SPANK_PLUGIN(standin, 1)

enum option { IMAGE, MOUNTS, WORKDIR, NAME, ENV, HOME, NO_HOME, REMAP, NO_REMAP, ENTRY, NO_ENTRY, WRITABLE, READONLY, COUNT };

static const char *value[COUNT];
static const char *scratch, *record;
static int mounted;

static int note(int number, const char *argument, int remote)
{
	(void)remote;
	if (number == NAME) {
		slurm_spank_log("pyxis stand-in: --container-name is refused: a named container outlives its job");
		return -1;
	}
	value[number] = argument ? strdup(argument) : "";
	return 0;
}

static struct spank_option options[COUNT] = {
	{ "container-image", "FILE", "[pyxis stand-in] squashfs file or folder", 1, IMAGE, note },
	{ "container-mounts", "SRC:DST[:FLAGS][,...]", "[pyxis stand-in] bind mounts", 1, MOUNTS, note },
	{ "container-workdir", "PATH", "[pyxis stand-in] working folder inside", 1, WORKDIR, note },
	{ "container-name", "NAME", "[pyxis stand-in] refused", 1, NAME, note },
	{ "container-env", "NAME[,NAME...]", "[pyxis stand-in] the job's values win over the image's", 1, ENV, note },
	{ "container-mount-home", NULL, "[pyxis stand-in] mount the home folder", 0, HOME, note },
	{ "no-container-mount-home", NULL, "[pyxis stand-in] do not mount the home folder", 0, NO_HOME, note },
	{ "container-remap-root", NULL, "[pyxis stand-in] recorded only", 0, REMAP, note },
	{ "no-container-remap-root", NULL, "[pyxis stand-in] recorded only", 0, NO_REMAP, note },
	{ "container-entrypoint", NULL, "[pyxis stand-in] recorded only", 0, ENTRY, note },
	{ "no-container-entrypoint", NULL, "[pyxis stand-in] recorded only", 0, NO_ENTRY, note },
	{ "container-writable", NULL, "[pyxis stand-in] a writable root file system", 0, WRITABLE, note },
	{ "container-readonly", NULL, "[pyxis stand-in] a read-only root file system", 0, READONLY, note },
};

static int fail(const char *format, ...)
{
	char line[3 * PATH_MAX];
	va_list words;
	va_start(words, format);
	vsnprintf(line, sizeof line, format, words);
	va_end(words);
	slurm_error("pyxis stand-in: container start failed with error code: 1");
	slurm_error("pyxis stand-in: printing enroot log file:");
	slurm_error("pyxis stand-in:     [ERROR] %s", line);
	return -1;
}

/* A path under the scratch folder; each call gives one of a few buffers in turn. */
static const char *inside(const char *name)
{
	static char buffers[8][PATH_MAX];
	static int next;
	char *buffer = buffers[next++ % 8];
	snprintf(buffer, PATH_MAX, "%s/%s", scratch, name);
	return buffer;
}

static int make_folders(const char *path)
{
	char part[PATH_MAX];
	snprintf(part, sizeof part, "%s", path);
	for (char *slash = strchr(part + 1, '/'); ; slash = strchr(slash + 1, '/')) {
		if (slash)
			*slash = 0;
		if (mkdir(part, 0755) && errno != EEXIST)
			return -1;
		if (!slash)
			return 0;
		*slash = '/';
	}
}

static int run_mount(const char *type, const char *flags, const char *source, const char *target)
{
	pid_t pid = fork();
	if (pid == 0) {
		execl("/bin/mount", "mount", "-t", type, "-o", flags, source, target, (char *)NULL);
		_exit(127);
	}
	int status = -1;
	while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
		;
	return status == 0 ? 0 : -1;
}

/* Bind SOURCE of the host at TARGET of the container, read-only if asked; makes the mount point. */
static int bind(const char *source, const char *target, int read_only)
{
	char path[2 * PATH_MAX];
	struct stat facts;
	if (stat(source, &facts))
		return fail("No such file or directory: %s (mount source)", source);
	snprintf(path, sizeof path, "%s%s", inside("root"), target);
	if (S_ISDIR(facts.st_mode)) {
		if (make_folders(path))
			return fail("%s: %s (mount target)", target, strerror(errno));
	} else {
		*strrchr(path, '/') = 0;
		make_folders(path);
		snprintf(path, sizeof path, "%s%s", inside("root"), target);
		int made = open(path, O_CREAT | O_WRONLY | O_NOFOLLOW, 0644);
		if (made >= 0)
			close(made);
	}
	if (mount(source, path, NULL, MS_BIND | MS_REC, NULL))
		return fail("%s at %s: %s", source, target, strerror(errno));
	if (read_only && mount(NULL, path, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
		return fail("%s at %s: read-only: %s", source, target, strerror(errno));
	return 0;
}

static int bind_all(const char *list)
{
	char *copy = strdup(list), *rest = copy;
	for (char *entry; (entry = strsep(&rest, ",")); ) {
		if (!*entry)
			continue;
		char *parts = entry, *source = strsep(&parts, ":"), *target = strsep(&parts, ":"), *flags = parts;
		if (!target)
			target = source;
		if (*source != '/' || *target != '/')
			return fail("mount %s:%s: both sides must be absolute paths", source, target);
		int read_only = 0;
		for (char *flag; flags && (flag = strsep(&flags, "+")); ) {
			if (!strcmp(flag, "ro"))
				read_only = 1;
			else if (strcmp(flag, "rw") && strcmp(flag, "rbind") && strcmp(flag, "bind"))
				return fail("mount %s:%s: unknown flag %s", source, target, flag);
		}
		if (bind(source, target, read_only))
			return -1;
	}
	free(copy);
	return 0;
}

static int mount_image(void)
{
	static const char *folders[] = { "lower", "upper", "work", "root", "tmp" };
	struct stat facts;
	char layers[4 * PATH_MAX];
	if (stat(value[IMAGE], &facts))
		return fail("No such file or directory: %s (container image)", value[IMAGE]);
	if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL))
		return fail("mount namespace: %s", strerror(errno));
	if (mount("tmpfs", scratch, "tmpfs", 0, "mode=0755"))
		return fail("%s: %s", scratch, strerror(errno));
	for (size_t i = 0; i < sizeof folders / sizeof *folders; i++)
		mkdir(inside(folders[i]), 0755);
	chmod(inside("tmp"), 01777);
	if (S_ISDIR(facts.st_mode)) {
		if (mount(value[IMAGE], inside("lower"), NULL, MS_BIND, NULL))
			return fail("%s: %s", value[IMAGE], strerror(errno));
	} else if (run_mount("squashfs", "loop,ro", value[IMAGE], inside("lower"))) {
		return fail("not a squashfs image: %s", value[IMAGE]);
	}
	snprintf(layers, sizeof layers, "lowerdir=%s,upperdir=%s,workdir=%s", inside("lower"), inside("upper"), inside("work"));
	if (mount("overlay", inside("root"), "overlay", 0, layers))
		return fail("overlay: %s", strerror(errno));
	return 0;
}

static int mount_everything(void)
{
	if (mount_image())
		return -1;
	if (bind("/proc", "/proc", 0) || bind("/sys", "/sys", 0) || bind("/dev", "/dev", 0) || bind(inside("tmp"), "/tmp", 0))
		return -1;
	if (bind("/etc/hosts", "/etc/hosts", 1))
		return -1;
	const char *home = getenv("HOME") ? getenv("HOME") : "/root";
	if (value[HOME] && bind(home, home, 0))
		return -1;
	if (value[MOUNTS] && bind_all(value[MOUNTS]))
		return -1;
	if (!value[WRITABLE] && mount(NULL, inside("root"), NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))
		return fail("read-only root: %s", strerror(errno));
	return 0;
}

static int in_list(const char *list, const char *name)
{
	size_t length = strlen(name);
	for (const char *at = list; at && (at = strstr(at, name)); at += length)
		if ((at == list || at[-1] == ',') && (!at[length] || at[length] == ','))
			return 1;
	return 0;
}

static void set_number(spank_t job, const char *name, unsigned number)
{
	char word[16];
	snprintf(word, sizeof word, "%u", number);
	spank_setenv(job, name, word, !in_list(value[ENV], name));
}

/* What enroot's 50-slurm-pytorch.sh does for an image that says PYTORCH_VERSION; the address is wrong on purpose. */
static void pytorch_hook(spank_t job)
{
	char word[256];
	uint32_t rank = 0, total = 0;
	int local = 0;
	if (spank_getenv(job, "PYTORCH_VERSION", word, sizeof word))
		return;
	spank_get_item(job, S_TASK_GLOBAL_ID, &rank);
	spank_get_item(job, S_TASK_ID, &local);
	spank_get_item(job, S_JOB_TOTAL_TASK_COUNT, &total);
	set_number(job, "RANK", rank);
	set_number(job, "LOCAL_RANK", local);
	set_number(job, "WORLD_SIZE", total);
	spank_setenv(job, "MASTER_ADDR", "set-by-the-hook.invalid", !in_list(value[ENV], "MASTER_ADDR"));
	spank_setenv(job, "MASTER_PORT", "1", !in_list(value[ENV], "MASTER_PORT"));
}

static void image_environment(spank_t job)
{
	char line[8192];
	spank_unsetenv(job, "LANG");
	spank_unsetenv(job, "LC_ALL");
	FILE *file = fopen("/etc/environment", "r");
	while (file && fgets(line, sizeof line, file)) {
		line[strcspn(line, "\n")] = 0;
		char *equals = strchr(line, '=');
		if (!equals || *line == '#')
			continue;
		*equals = 0;
		spank_setenv(job, line, equals + 1, !in_list(value[ENV], line));
	}
	if (file)
		fclose(file);
	pytorch_hook(job);
}

static void write_record(spank_t job)
{
	char path[PATH_MAX], host[256] = "";
	uint32_t id = 0, step = 0, rank = 0;
	spank_get_item(job, S_JOB_ID, &id);
	spank_get_item(job, S_JOB_STEPID, &step);
	spank_get_item(job, S_TASK_GLOBAL_ID, &rank);
	snprintf(path, sizeof path, "%s/%u.%u.%u", record, id, step, rank);
	FILE *file = fopen(path, "w");
	if (!file)
		return;
	gethostname(host, sizeof host - 1);
	fprintf(file, "host=%s\n", host);
	for (int i = 0; i < COUNT; i++)
		if (value[i])
			fprintf(file, "%s=%s\n", options[i].name, value[i]);
	fclose(file);
}

int slurm_spank_init(spank_t job, int count, char *words[])
{
	for (int i = 0; i < count; i++) {
		if (!strncmp(words[i], "scratch=", 8))
			scratch = strdup(words[i] + 8);
		else if (!strncmp(words[i], "record=", 7))
			record = strdup(words[i] + 7);
	}
	if (spank_context() != S_CTX_LOCAL && spank_context() != S_CTX_REMOTE)
		return 0;
	for (int i = 0; i < COUNT; i++)
		if (spank_option_register(job, &options[i]))
			return -1;
	return 0;
}

/* Once a step and node, in the daemon of the step; the mounts are its own and go with it. */
int slurm_spank_user_init(spank_t job, int count, char *words[])
{
	(void)job, (void)count, (void)words;
	if (!value[IMAGE])
		return 0;
	/* pyxis imports here, and srun of Slurm 22.05 ends with 0 where this fails: no task was ever started. */
	if (*value[IMAGE] != '/')
		return fail("failed to import docker image: %s: nothing is pulled here", value[IMAGE]);
	/* What enroot cannot start fails in the tasks. */
	mounted = mount_everything() == 0;
	return 0;
}

int slurm_spank_task_init_privileged(spank_t job, int count, char *words[])
{
	(void)count, (void)words;
	if (!value[IMAGE])
		return 0;
	write_record(job);
	if (!mounted)
		return -1;
	if (chroot(inside("root")) || chdir("/"))
		return fail("chroot: %s", strerror(errno));
	image_environment(job);
	return 0;
}

/* The daemon has changed to the job's folder in between. */
int slurm_spank_task_init(spank_t job, int count, char *words[])
{
	(void)job, (void)count, (void)words;
	if (value[IMAGE] && chdir(value[WORKDIR] ? value[WORKDIR] : "/"))
		return fail("%s: %s (working folder)", value[WORKDIR], strerror(errno));
	return 0;
}
